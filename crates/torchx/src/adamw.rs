//! AdamW on libtorch's fused kernels, with moments that can be saved.

use tch::{Device, Kind, Tensor, no_grad};

use crate::error::{Error, StateProblem};
use crate::ffi;

/// The constants of AdamW; the learning rate comes with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of the parameters that decay.
    pub weight_decay: f64,
}

/// Adam with decoupled weight decay (Loshchilov and Hutter, 2019) over two groups: with decay and without.
pub struct AdamW {
    cfg: AdamWConfig,
    decayed: Group,
    undecayed: Group,
}

#[derive(Default)]
struct Group {
    names: Vec<String>,
    params: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl AdamW {
    /// Takes the parameters by name, each with whether weight decay applies to it.
    ///
    /// A parameter without a gradient at a step is left alone in it, its step counter too.
    pub fn new(params: Vec<(String, Tensor, bool)>, cfg: AdamWConfig) -> Self {
        let mut optimizer = Self { cfg, decayed: Group::default(), undecayed: Group::default() };
        for (name, param, decay) in params {
            let group = if decay { &mut optimizer.decayed } else { &mut optimizer.undecayed };
            group.push(name, param);
        }
        optimizer
    }

    /// One update of all parameters from their gradients.
    ///
    /// With `grad_scale` the gradients are divided by it first. A `found_inf` that is not zero skips the whole update on
    /// the device, step counters included, without the host knowing.
    ///
    /// # Shapes
    /// grad_scale, found_inf: `[]` or `[1]`, fp32, on the parameters' device.
    pub fn step(&mut self, lr: f64, grad_scale: Option<&Tensor>, found_inf: Option<&Tensor>) {
        self.decayed.step(&self.cfg, self.cfg.weight_decay, lr, grad_scale, found_inf);
        self.undecayed.step(&self.cfg, 0.0, lr, grad_scale, found_inf);
    }

    /// Drops all gradients, so that the next backward pass allocates fresh ones.
    pub fn zero_grad(&mut self) {
        for group in [&self.decayed, &self.undecayed] {
            let params = ffi::pointers(&group.params);
            // SAFETY: the pointers are live tensors for the call.
            let code = unsafe { ffi::torchx_clear_grads(params.as_ptr(), params.len()) };
            ffi::expect(ffi::check("clear gradients", code));
        }
    }

    /// Everything a resumed run needs: `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME` of every parameter, sorted.
    ///
    /// The tensors share memory with the optimizer.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state: Vec<_> = self.slots().map(|(key, tensor)| (key, tensor.shallow_clone())).collect();
        state.sort_by(|a, b| a.0.cmp(&b.0));
        state
    }

    /// Copies a saved state in, on whatever device it lies.
    ///
    /// # Errors
    /// [`Error::State`] with every key that is missing or has another shape; nothing is changed then.
    pub fn load_state(&mut self, get: impl Fn(&str) -> Option<Tensor>) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut copies = Vec::new();
        for (key, slot) in self.slots() {
            match get(&key) {
                None => problems.push(StateProblem::Missing { key }),
                Some(saved) if saved.size() != slot.size() => {
                    problems.push(StateProblem::Shape { key, expected: slot.size(), got: saved.size() })
                }
                Some(saved) => copies.push((slot.shallow_clone(), saved)),
            }
        }
        if !problems.is_empty() {
            return Err(Error::State { problems });
        }
        no_grad(|| copies.iter_mut().for_each(|(slot, saved)| slot.copy_(saved)));
        Ok(())
    }

    fn slots(&self) -> impl Iterator<Item = (String, &Tensor)> {
        [&self.decayed, &self.undecayed].into_iter().flat_map(|group| {
            group.names.iter().enumerate().flat_map(|(i, name)| {
                [
                    (format!("exp_avg.{name}"), &group.exp_avgs[i]),
                    (format!("exp_avg_sq.{name}"), &group.exp_avg_sqs[i]),
                    (format!("step.{name}"), &group.steps[i]),
                ]
            })
        })
    }
}

impl Group {
    fn push(&mut self, name: String, param: Tensor) {
        let device: Device = param.device();
        let detached = param.detach();
        self.names.push(name);
        self.exp_avgs.push(detached.zeros_like());
        self.exp_avg_sqs.push(detached.zeros_like());
        self.steps.push(Tensor::zeros([], (Kind::Float, device)));
        self.params.push(param);
    }

    fn step(
        &self,
        cfg: &AdamWConfig,
        weight_decay: f64,
        lr: f64,
        grad_scale: Option<&Tensor>,
        found_inf: Option<&Tensor>,
    ) {
        let params = ffi::pointers(&self.params);
        let exp_avgs = ffi::pointers(&self.exp_avgs);
        let exp_avg_sqs = ffi::pointers(&self.exp_avg_sqs);
        let steps = ffi::pointers(&self.steps);
        // SAFETY: four lists of `params.len()` live tensors; the optional ones are live or null.
        let code = unsafe {
            ffi::torchx_adamw_step(
                params.as_ptr(),
                exp_avgs.as_ptr(),
                exp_avg_sqs.as_ptr(),
                steps.as_ptr(),
                params.len(),
                lr,
                cfg.betas.0,
                cfg.betas.1,
                weight_decay,
                cfg.eps,
                ffi::optional(grad_scale),
                ffi::optional(found_inf),
            )
        };
        ffi::expect(ffi::check("AdamW step", code));
    }
}
