//! Checkpoints: written beside and renamed, verified when read, on a thread of their own while training goes on.

mod error;
mod folder;
mod manifest;
pub(crate) mod snapshot;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod writer;

pub use error::CheckpointError;
pub use folder::CheckpointFolder;
pub use manifest::{Checkpoint, Metric};
pub use state::{Best, TrainState};
pub use store::{CheckpointStore, Newest, Rejected};
pub use writer::{CheckpointWriter, Snapshot};
