//! Measuring a model on held-out data: while it is trained, and by `blip2 evaluate`.
//!
//! ```text
//! held_out    the set, a pass over its batches, and the figures that come of one
//! retrieval   stage 1: losses, and recall by ITC's similarity
//! rerank      recall behind ITM: the scores of the pairs that re-ranking asks for
//! captions    stage 2: loss and sample captions; `Stage2Task::evaluate`, in task/stage2
//! vqa         stage 2: answers to questions
//! report      what `blip2 evaluate` measures of a run's checkpoint, and what it prints
//! ```

mod held_out;
mod report;
mod rerank;
mod retrieval;
mod vqa;

pub use held_out::{Evaluation, HeldOut, one_line};
pub(crate) use held_out::{HeldOutSet, Means, RECALL_RANKS, SampleText, Tell};
pub use report::{CaptionPair, EvaluationTask, Measured, Recall, Report, RunReport, evaluate_run};
pub use rerank::Gallery;
pub(crate) use retrieval::retrieval;
pub use vqa::AnsweredQuestion;
