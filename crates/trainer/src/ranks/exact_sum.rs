//! Gradients added up exactly.
//!
//! A sum of fp32 numbers depends on the order in which they are added: on how many ranks and micro-batches share a step. Here every gradient is
//! split into a multiple of [`COARSE`] and what is left, a multiple of [`FINE`]. In fp64 sums of such multiples have no rounding, so any order
//! gives the same bits; only the two sums together are rounded, once.

use std::cell::RefCell;

use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor, no_grad};

use super::{Gradients, Ranks};
use crate::error::Error;

/// 2^-20: sums are exact as far as 2^33.
const COARSE: f64 = 1.0 / (1u64 << 20) as f64;
/// 2^-64, at which gradients are rounded: sums of what is left, 2^-21 at most, are exact for 1,024 micro-batches in a step.
const FINE: f64 = COARSE / (1u64 << 44) as f64;

/// Sums of all parameters' gradients, behind one another.
pub(super) struct ExactSum<R> {
    params: Vec<Tensor>,
    /// f64 `[2, numbers of all parameters]`: of the coarse parts and of the fine ones
    sums: RefCell<Tensor>,
    ranks: R,
}

impl<R: Ranks> ExactSum<R> {
    pub(super) fn new(params: &ParamStore, ranks: R) -> ExactSum<R> {
        let device = params.device();
        let params: Vec<Tensor> = params.entries().into_iter().map(|(_, tensor, _)| tensor).collect();
        let numbers = params.iter().map(|tensor| tensor.numel() as i64).sum::<i64>();
        ExactSum { params, sums: RefCell::new(Tensor::zeros([2, numbers], (Kind::Double, device))), ranks }
    }

    /// Every gradient that there is, with its place among the sums, `[2, its numbers]`.
    fn each(&self, sums: &Tensor, mut change: impl FnMut(Tensor, Tensor)) {
        let mut first = 0;
        for param in &self.params {
            let numbers = param.numel() as i64;
            let gradient = param.grad();
            if gradient.defined() {
                change(gradient, sums.narrow(1, first, numbers));
            }
            first += numbers;
        }
    }
}

impl<R: Ranks> Gradients for ExactSum<R> {
    fn divisor(&self) -> Option<f64> {
        None
    }

    fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Error> {
        loss.backward();
        let sums = self.sums.borrow_mut();
        no_grad(|| {
            self.each(&sums, |mut gradient, sum| {
                add(&gradient, &sum);
                let _ = gradient.zero_();
            });
            if last {
                self.ranks.add_up_gradients(&sums)?;
                self.each(&sums, |mut gradient, sum| gradient.copy_(&total(&sum).view_as(&gradient)));
                let _ = sums.shallow_clone().zero_();
            }
            Ok(())
        })
    }
}

/// Adds a gradient to its sums, f64 `[2, its numbers]`. What is not finite stays so.
fn add(gradient: &Tensor, sums: &Tensor) {
    let numbers = gradient.flatten(0, -1).to_kind(Kind::Double);
    let coarse = to_multiples(&numbers, COARSE);
    let fine = to_multiples(&(numbers - &coarse), FINE);
    let _ = sums.get(0).g_add_(&coarse);
    let _ = sums.get(1).g_add_(&fine);
}

/// The sum that is meant: f64 `[numbers]`.
fn total(sums: &Tensor) -> Tensor {
    sums.get(0) + sums.get(1)
}

fn to_multiples(numbers: &Tensor, unit: f64) -> Tensor {
    (numbers * (1.0 / unit)).round_() * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sums of the gradients in this order, as fp32.
    fn sum_of<'a>(gradients: impl Iterator<Item = &'a Vec<f32>>, numbers: usize) -> Vec<u32> {
        let sums = Tensor::zeros([2, numbers as i64], (Kind::Double, tch::Device::Cpu));
        gradients.for_each(|gradient| add(&Tensor::from_slice(gradient), &sums));
        let total = Vec::<f32>::try_from(total(&sums).to_kind(Kind::Float)).unwrap();
        total.into_iter().map(f32::to_bits).collect()
    }

    fn gradient() -> impl Strategy<Value = f32> {
        (-1.0f32..1.0, -40i32..20).prop_map(|(number, exponent)| number * (exponent as f32).exp2())
    }

    proptest! {
        #[test]
        fn any_order_gives_the_same_bits(
            gradients in prop::collection::vec(prop::collection::vec(gradient(), 16), 1..24),
            turn in 0usize..24,
        ) {
            let in_order = sum_of(gradients.iter(), 16);
            let (before, behind) = gradients.split_at(turn.min(gradients.len()));
            prop_assert_eq!(&sum_of(behind.iter().rev().chain(before), 16), &in_order);
            for (number, bits) in in_order.iter().enumerate() {
                let expected: f64 = gradients.iter().map(|gradient| f64::from(gradient[number])).sum();
                let got = f64::from(f32::from_bits(*bits));
                prop_assert!((got - expected).abs() <= expected.abs() * 1e-7 + 1e-12, "{} instead of {}", got, expected);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_in_the_sum() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let bits = sum_of([vec![1.0, bad], vec![1.0, 1.0]].iter(), 2);
            assert_eq!(f32::from_bits(bits[0]), 2.0);
            assert!(!f32::from_bits(bits[1]).is_finite());
        }
    }
}
