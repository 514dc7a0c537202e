//! One optimizer step: accumulate, check, clip, update. Nothing here waits for the device.

use blip2_torchx::adamw::AdamW;
use blip2_torchx::foreach;
use blip2_torchx::grad_scaler::GradScaler;
use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor, no_grad};

use crate::data::batch::Batch;
use crate::error::Error;
use crate::masks;
use crate::ranks::{Gradients, Ranks};
use crate::task::{ForwardOptions, Task};

/// Optimizer, loss scaler and the watch over finite numbers.
pub struct Stepper {
    /// The moments.
    pub adamw: AdamW,
    /// The loss scale; an identity outside fp16.
    pub scaler: GradScaler,
    gradients: Box<dyn Gradients>,
    guard: FiniteGuard,
    clip_norm: f64,
}

/// Metrics of one step by name, 0-d on the device.
pub type StepMetrics = Vec<(&'static str, Tensor)>;

impl Stepper {
    /// `clip_norm` 0 leaves gradients as they are.
    pub fn new(
        adamw: AdamW,
        scaler: GradScaler,
        gradients: Box<dyn Gradients>,
        params: &ParamStore,
        clip_norm: f64,
    ) -> Stepper {
        Stepper { adamw, scaler, gradients, guard: FiniteGuard::new(params.device()), clip_norm }
    }

    /// Updates the task's parameters from this rank's micro-batches of one global batch; every rank makes the same update.
    ///
    /// A step whose loss or gradient is not finite changes nothing on the device, nor does any later one, until
    /// [`Stepper::take_bad_step`] has reported it.
    ///
    /// # Errors
    /// When a micro-batch cannot be made, or a rank is lost.
    pub fn step(
        &mut self,
        task: &dyn Task,
        mut micro_batches: impl ExactSizeIterator<Item = Result<Batch, Error>>,
        pass: &ForwardOptions,
        step: u64,
        lr: f64,
        ranks: &dyn Ranks,
    ) -> Result<StepMetrics, Error> {
        let mut metrics: StepMetrics = Vec::new();
        masks::begin_step(task.params().device(), pass.seed, step, ranks.rank())?;
        let (gradients, scaler) = (&self.gradients, &self.scaler);
        task.step(&mut micro_batches, pass, ranks, &mut |losses, last| {
            let total = gradients.divisor().map_or(losses.total.shallow_clone(), |divisor| &losses.total * divisor);
            gradients.backward(&scaler.scale(&total), last)?;
            add(&mut metrics, losses.metrics);
            Ok(())
        })?;
        add_up(&mut metrics, ranks)?;
        let grads: Vec<Tensor> =
            task.params().entries().into_iter().map(|(_, t, _)| t.grad()).filter(Tensor::defined).collect();
        let device = task.params().device();
        let overflow = Tensor::zeros([], (Kind::Float, device));
        if self.scaler.is_enabled() {
            foreach::unscale_(&grads, &overflow, &self.scaler.inv_scale());
        }
        let norm = foreach::norm(&grads);
        let loss = metrics.iter().find(|(n, _)| *n == "loss").map(|(_, t)| t.shallow_clone());
        let finite_loss = loss.map_or_else(|| norm.ones_like().to_kind(Kind::Bool), |l| l.isfinite());
        let finite_norm = norm.isfinite();
        // An fp16 overflow behind a finite loss is the scaler's business until its scale is at the floor.
        let excused = if self.scaler.is_enabled() {
            overflow.gt(0.0).logical_and(&self.scaler.current_scale().gt(GradScaler::FLOOR))
        } else {
            finite_norm.zeros_like()
        };
        let good = finite_loss.logical_and(&finite_norm.logical_or(&excused));
        self.guard.observe(step, &good);
        let skip = self.guard.skip().maximum(&finite_norm.logical_not().to_kind(Kind::Float));
        if self.clip_norm > 0.0 {
            foreach::mul_(&grads, &(self.clip_norm / (&norm + 1e-6)).clamp_max(1.0));
        }
        self.adamw.step(lr, None, Some(&skip));
        if self.scaler.is_enabled() {
            self.scaler.update(&overflow);
            metrics.push(("loss_scale", self.scaler.current_scale()));
        }
        self.adamw.zero_grad();
        metrics.push(("grad_norm", norm));
        Ok(metrics)
    }

    /// The first step since the last call whose numbers were not finite. Reading it waits for the device.
    pub fn take_bad_step(&mut self) -> Option<u64> {
        self.guard.take()
    }
}

fn add(sum: &mut StepMetrics, more: StepMetrics) {
    if sum.is_empty() {
        *sum = more;
        return;
    }
    no_grad(|| {
        for ((_, sum), (_, value)) in sum.iter_mut().zip(more) {
            // Not in place: two names may share one tensor.
            *sum = &*sum + value;
        }
    });
}

/// Each rank's metrics have its share of the global batch, so that their sums are the global batch's.
fn add_up(metrics: &mut StepMetrics, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.is_alone() {
        return Ok(());
    }
    let all = Tensor::stack(&metrics.iter().map(|(_, value)| value.to_kind(Kind::Float)).collect::<Vec<_>>(), 0);
    ranks.add_up(&all)?;
    for ((_, value), sum) in metrics.iter_mut().zip(all.unbind(0)) {
        *value = sum;
    }
    Ok(())
}

/// A sticky flag on the device: 0, or 1 + the number of the first bad step.
struct FiniteGuard {
    flag: Tensor,
}

impl FiniteGuard {
    fn new(device: tch::Device) -> FiniteGuard {
        FiniteGuard { flag: Tensor::zeros([], (Kind::Int64, device)) }
    }

    fn observe(&mut self, step: u64, good: &Tensor) {
        let now = good.logical_not().to_kind(Kind::Int64) * (step as i64 + 1);
        self.flag = self.flag.where_self(&self.flag.gt(0), &now);
    }

    /// 1 from the first bad step on, as the fused optimizer takes it.
    fn skip(&self) -> Tensor {
        self.flag.gt(0).to_kind(Kind::Float)
    }

    fn take(&mut self) -> Option<u64> {
        let flag = self.flag.int64_value(&[]);
        if flag == 0 {
            return None;
        }
        self.flag = self.flag.zeros_like();
        Some(flag as u64 - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::{Negatives, Share, TargetRule, Targets};
    use crate::ranks::Alone;
    use crate::task::{Evaluation, HeldOut, Losses, Reference};
    use blip2_model::qformer::TextBatch;
    use blip2_torchx::adamw::AdamWConfig;
    use blip2_torchx::params::Init;
    use tch::Device;

    /// `loss = sum(w * x)`, with x in the batch's features.
    struct Linear {
        params: ParamStore,
        w: Tensor,
    }

    impl Task for Linear {
        fn params(&self) -> &ParamStore {
            &self.params
        }

        fn forward(&self, batch: &Batch, _: &ForwardOptions, _: &dyn Ranks) -> Result<Losses, Error> {
            let total = (&self.w * &batch.features).sum(Kind::Float) * batch.share.samples;
            Ok(Losses { metrics: vec![("loss", total.detach()), ("loss_same", total.detach())], total })
        }

        fn target_rule(&self) -> TargetRule {
            TargetRule { untargeted: 0 }
        }

        fn reference(&self, _: &str, _: usize) -> Option<Reference> {
            None
        }

        fn evaluate(&self, _: &mut HeldOut, _: &ForwardOptions) -> Result<Evaluation, Error> {
            Ok(Evaluation::default())
        }
    }

    const FORWARD: ForwardOptions = ForwardOptions { autocast: None, dropout: 0.0, seed: 0 };

    fn batch(x: f32, share: f64) -> Result<Batch, Error> {
        let ids = Tensor::zeros([1, 1], (Kind::Int64, Device::Cpu));
        Ok(Batch {
            features: Tensor::from_slice(&[x, 1.0]),
            targets: Targets::from_labels(&ids, 0),
            text: TextBatch::new(ids.shallow_clone(), &ids),
            image_ids: ids.shallow_clone(),
            positions: ids.shallow_clone(),
            negatives: Negatives::Given(ids.shallow_clone(), ids.shallow_clone()),
            share: Share { samples: share, tokens: share },
            sent_as: Kind::Float,
        })
    }

    fn setup(clip: f64) -> (Linear, Stepper) {
        let params = ParamStore::trainable(Device::Cpu);
        let w = params.root().param("w", &[2], Init::Ones);
        let config = AdamWConfig { betas: (0.9, 0.98), eps: 1e-8, weight_decay: 0.0 };
        let stepper = Stepper::new(
            AdamW::new(params.entries(), config),
            GradScaler::new(Device::Cpu, false),
            Box::new(Alone),
            &params,
            clip,
        );
        (Linear { params, w }, stepper)
    }

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::<f32>::try_from(&t.detach()).unwrap()
    }

    #[test]
    fn micro_batches_with_their_shares_are_the_whole_batch() {
        let (whole, mut one) = setup(0.0);
        let (parts, mut two) = setup(0.0);
        let a = one.step(&whole, [batch(3.0, 1.0)].into_iter(), &FORWARD, 0, 0.1, &Alone).unwrap();
        let b = two.step(&parts, [batch(2.0, 0.5), batch(4.0, 0.5)].into_iter(), &FORWARD, 0, 0.1, &Alone).unwrap();
        assert_eq!(values(&whole.w), values(&parts.w));
        for ((name, x), (_, y)) in a.iter().zip(&b) {
            assert_eq!(x.double_value(&[]), y.double_value(&[]), "{name}");
        }
    }

    #[test]
    fn a_bad_step_and_all_behind_it_change_nothing_until_it_is_taken() {
        let (task, mut stepper) = setup(0.0);
        stepper.step(&task, [batch(1.0, 1.0)].into_iter(), &FORWARD, 0, 0.1, &Alone).unwrap();
        assert_eq!(stepper.take_bad_step(), None);
        let before = values(&task.w);
        stepper.step(&task, [batch(f32::NAN, 1.0)].into_iter(), &FORWARD, 1, 0.1, &Alone).unwrap();
        stepper.step(&task, [batch(1.0, 1.0)].into_iter(), &FORWARD, 2, 0.1, &Alone).unwrap();
        assert_eq!(values(&task.w), before);
        assert_eq!(stepper.take_bad_step(), Some(1));
        stepper.step(&task, [batch(1.0, 1.0)].into_iter(), &FORWARD, 2, 0.1, &Alone).unwrap();
        assert_eq!(stepper.take_bad_step(), None);
        assert_ne!(values(&task.w), before);
    }

    #[test]
    fn clipping_bounds_the_gradient_and_reports_its_norm() {
        let (task, mut stepper) = setup(0.5);
        let metrics = stepper.step(&task, [batch(0.0, 3.0)].into_iter(), &FORWARD, 0, 0.0, &Alone).unwrap();
        let norm = metrics.iter().find(|(n, _)| *n == "grad_norm").unwrap().1.double_value(&[]);
        assert!((norm - 3.0).abs() < 1e-6, "{norm}");
        let moment = stepper.adamw.state().into_iter().find(|(n, _)| n == "exp_avg.w").unwrap().1;
        assert!((moment.norm().double_value(&[]) - 0.05).abs() < 1e-6, "0.1 of a gradient of norm 0.5");
    }
}
