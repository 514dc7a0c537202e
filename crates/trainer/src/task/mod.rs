//! What a stage learns: a micro-batch in, named losses out. The loop knows no more of a stage than this.

pub mod stage1;
pub mod stage2;

use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor};

use crate::batch::Batch;
pub use crate::batch::TargetRule;
use crate::error::Error;
pub use crate::evaluation::{Evaluation, HeldOut};
pub use stage1::Stage1Task;
pub use stage2::Stage2Task;

/// The losses of one micro-batch.
pub struct Losses {
    /// What is differentiated: the weighted sum, scaled to the micro-batch's share of the global batch; 0-d.
    pub total: Tensor,
    /// Named means and accuracies over the micro-batch with their share, 0-d, detached. Summed over micro-batches they are the global
    /// batch's.
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
pub struct Pass {
    /// Autocast to this dtype; `None`: fp32.
    pub autocast: Option<Kind>,
    /// Dropout of the Q-Former; 0 in evaluation.
    pub dropout: f64,
    /// What masks are keyed by.
    pub seed: u64,
}

/// A training stage.
pub trait Task {
    /// What is trained.
    fn params(&self) -> &ParamStore;

    /// The losses of a micro-batch.
    fn forward(&self, batch: &Batch, pass: &Pass) -> Losses;

    /// Which tokens of a text are targets.
    fn target_rule(&self) -> TargetRule;

    /// Chance and floor of a loss for batches of this many samples.
    fn reference(&self, metric: &str, batch: usize) -> Option<Reference>;

    /// What the stage measures on held-out data, dropout off.
    ///
    /// # Errors
    /// When held-out samples cannot be read.
    fn evaluate(&self, held_out: &mut HeldOut, pass: &Pass) -> Result<Evaluation, Error>;
}
