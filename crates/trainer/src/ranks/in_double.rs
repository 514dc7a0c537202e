//! Gradients added up in fp64.
//!
//! A sum of fp32 numbers depends on the order in which they are added: on how many ranks and micro-batches share a step. In fp64 the order
//! shows 29 bits further down, so that what is rounded back to fp32 is, but for a few numbers in a billion, the same for every division
//! of the step into equal micro-batches.

use std::cell::RefCell;

use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor, no_grad};

use super::{Gradients, Ranks};
use crate::error::Error;

/// Sums of all parameters' gradients, behind one another.
pub(super) struct InDouble<R> {
    params: Vec<Tensor>,
    /// f64 `[numbers of all parameters]`
    sums: RefCell<Tensor>,
    ranks: R,
}

impl<R: Ranks> InDouble<R> {
    pub(super) fn new(params: &ParamStore, ranks: R) -> InDouble<R> {
        let device = params.device();
        let params: Vec<Tensor> = params.entries().into_iter().map(|(_, tensor, _)| tensor).collect();
        let numbers = params.iter().map(|tensor| tensor.numel() as i64).sum::<i64>();
        InDouble { params, sums: RefCell::new(Tensor::zeros([numbers], (Kind::Double, device))), ranks }
    }

    /// Every gradient that there is, with its place among the sums.
    fn each(&self, sums: &Tensor, mut change: impl FnMut(Tensor, Tensor)) {
        let mut first = 0;
        for param in &self.params {
            let numbers = param.numel() as i64;
            let (gradient, sum) = (param.grad(), sums.narrow(0, first, numbers));
            if gradient.defined() {
                let sum = sum.view_as(&gradient);
                change(gradient, sum);
            }
            first += numbers;
        }
    }
}

impl<R: Ranks> Gradients for InDouble<R> {
    fn divisor(&self) -> Option<f64> {
        None
    }

    fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Error> {
        loss.backward();
        let sums = self.sums.borrow_mut();
        no_grad(|| {
            self.each(&sums, |mut gradient, mut sum| {
                let _ = sum.g_add_(&gradient);
                let _ = gradient.zero_();
            });
            if last {
                self.ranks.add_up_gradients(&sums)?;
                self.each(&sums, |mut gradient, sum| gradient.copy_(&sum));
                let _ = sums.shallow_clone().zero_();
            }
            Ok(())
        })
    }
}
