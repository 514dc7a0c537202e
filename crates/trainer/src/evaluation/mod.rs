//! Measuring a model on held-out data: while it is trained, and by `blip2 evaluate`.
//!
//! ```text
//! held_out    the set, a pass over its batches, and the figures that come of one
//! retrieval   recall by ITC's similarity: `Stage1Task::evaluate`, in task/stage1
//! rerank      recall behind ITM: the scores of the pairs that re-ranking asks for
//! captions    loss and sample captions: `Stage2Task::evaluate`, in task/stage2
//! vqa         answers to questions
//! report      what `blip2 evaluate` measures of a run's checkpoint, and what it prints
//! ```

mod held_out;
mod report;
mod rerank;
mod vqa;

pub use held_out::{Evaluation, HeldOut};
pub(crate) use held_out::{HeldOutSet, Means, RECALL_RANKS, SampleText, Tell};
pub use report::{CaptionPair, EvaluationTask, Recall, Report, RunReport, evaluate_run};
pub use rerank::Gallery;
pub use vqa::AnsweredQuestion;
