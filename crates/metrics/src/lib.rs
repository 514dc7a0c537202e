//! Evaluation metrics as plain functions of numbers and strings; this crate knows no libtorch.
//!
//! - [`retrieval`]: recall at k in both directions from a similarity matrix.
//! - [`rerank`]: the same when the candidates that similarity puts first are ordered anew.
//! - [`captions`]: how much generated captions say, and how much of it is right.
//! - [`vqa`]: how many people would answer a question so.
//! - [`chance`]: what a model that knows nothing scores.

pub mod captions;
pub mod chance;
pub mod rerank;
pub mod retrieval;
pub mod vqa;

pub use captions::{CaptionError, CaptionSummary, summarize_captions};
pub use chance::chance_recall;
pub use rerank::Shortlists;
pub use retrieval::{Recall, RetrievalError, recall_at};
pub use vqa::{normalize_answer, vqa_accuracy};
