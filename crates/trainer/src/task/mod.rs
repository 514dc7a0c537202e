//! What a stage learns: a micro-batch in, named losses out. The loop knows no more of a stage than this.

mod cached_contrast;
pub mod stage1;
mod stage2;

use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor};

use crate::data::batch::Batch;
pub use crate::data::batch::TargetRule;
use crate::error::Error;
pub use crate::evaluation::{Evaluation, HeldOut};
use crate::ranks::Ranks;
pub use stage1::Stage1Task;
pub use stage2::Stage2Task;

/// The losses of one micro-batch.
pub struct Losses {
    /// What is differentiated: the weighted sum, scaled to the micro-batch's share of the global batch; 0-d.
    pub total: Tensor,
    /// Named means and accuracies over the micro-batch with their share, 0-d, detached. Summed over micro-batches and ranks they are the
    /// global batch's.
    pub metrics: Vec<(&'static str, Tensor)>,
}

/// One point of reference of a metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reference {
    /// Its value for a model that knows nothing.
    pub chance: f64,
    /// The best it can be.
    pub floor: f64,
}

/// How a forward pass computes.
#[derive(Debug, Clone, Copy)]
pub struct ForwardOptions {
    /// Autocast to this dtype; `None`: fp32.
    pub autocast: Option<Kind>,
    /// Dropout of the Q-Former; 0 in evaluation.
    pub dropout: f64,
    /// What masks are keyed by.
    pub seed: u64,
}

/// Micro-batches that know nothing of each other.
fn one_by_one(
    micro_batches: &mut dyn ExactSizeIterator<Item = Result<Batch, Error>>,
    forward: &dyn Fn(&Batch) -> Result<Losses, Error>,
    each: &mut dyn FnMut(Losses, bool) -> Result<(), Error>,
) -> Result<(), Error> {
    while let Some(batch) = micro_batches.next() {
        each(forward(&batch?)?, micro_batches.len() == 0)?;
    }
    Ok(())
}

/// A training stage.
pub trait Task {
    /// What is trained.
    fn params(&self) -> &ParamStore;

    /// The frozen tower behind the trained part, where there is one.
    fn frozen(&self) -> Option<&ParamStore> {
        None
    }

    /// Stage 2, which alone writes texts, where the task is that.
    fn as_stage2(&self) -> Option<&Stage2Task> {
        None
    }

    /// The losses of a micro-batch, while the other ranks compute theirs.
    ///
    /// # Errors
    /// When a rank is lost.
    fn forward(&self, batch: &Batch, pass: &ForwardOptions, ranks: &dyn Ranks) -> Result<Losses, Error>;

    /// The losses of a step's micro-batches in turn; `each` hears of one and whether it is the last before the next is computed.
    ///
    /// # Errors
    /// Those of the micro-batches and of `each`.
    fn step(
        &self,
        micro_batches: &mut dyn ExactSizeIterator<Item = Result<Batch, Error>>,
        pass: &ForwardOptions,
        ranks: &dyn Ranks,
        each: &mut dyn FnMut(Losses, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        one_by_one(micro_batches, &|batch| self.forward(batch, pass, ranks), each)
    }

    /// Which tokens of a text are targets.
    fn target_rule(&self) -> TargetRule;

    /// Chance and floor of a loss for batches of this many samples.
    fn reference(&self, metric: &str, batch: usize) -> Option<Reference>;

    /// What the stage measures on held-out data, dropout off.
    ///
    /// # Errors
    /// When held-out samples cannot be read, or a rank is lost.
    fn evaluate(&self, held_out: &mut HeldOut, pass: &ForwardOptions) -> Result<Evaluation, Error>;
}
