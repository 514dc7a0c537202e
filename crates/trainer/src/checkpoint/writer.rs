//! Writes checkpoints while training goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::error::CheckpointError;
use super::folder::CheckpointFolder;
use super::manifest::Metric;
use super::store::CheckpointStore;

/// Writes a snapshot's files; it owns copies of everything that training changes meanwhile.
pub type Snapshot = Box<dyn FnOnce(&mut CheckpointFolder) -> Result<(), CheckpointError> + Send>;

/// At most one checkpoint at a time, on a thread of its own.
///
/// Dropping it waits for the one in flight, whose result is lost then: end with [`CheckpointWriter::finish`].
#[derive(Debug)]
pub struct CheckpointWriter {
    store: Arc<CheckpointStore>,
    in_flight: Option<InFlight>,
}

#[derive(Debug)]
struct InFlight {
    step: u64,
    thread: JoinHandle<Result<PathBuf, CheckpointError>>,
}

impl CheckpointWriter {
    /// A writer into `store`.
    pub fn new(store: CheckpointStore) -> Self {
        Self { store: Arc::new(store), in_flight: None }
    }

    /// The store it writes into.
    pub fn store(&self) -> &CheckpointStore {
        &self.store
    }

    /// Begins to write `snapshot`, after the one before is done, and returns what became of that one.
    ///
    /// # Errors
    /// The checkpoint before could not be written; the new one is begun all the same.
    pub(crate) fn submit(
        &mut self,
        step: u64,
        metric: Option<Metric>,
        snapshot: Snapshot,
    ) -> Result<Option<PathBuf>, CheckpointError> {
        let before = self.wait();
        let store = Arc::clone(&self.store);
        let thread = Builder::new()
            .name("checkpoint".into())
            .spawn(move || store.write(step, metric, snapshot))
            .map_err(CheckpointError::io(self.store.path(step)))?;
        self.in_flight = Some(InFlight { step, thread });
        before
    }

    /// What became of the checkpoint in flight, where it is done; never waits.
    pub(crate) fn poll(&mut self) -> Option<Result<PathBuf, CheckpointError>> {
        if self.in_flight.as_ref().is_some_and(|one| one.thread.is_finished()) { self.wait().transpose() } else { None }
    }

    /// Waits for the checkpoint in flight, where there is one.
    ///
    /// # Errors
    /// It could not be written.
    pub fn wait(&mut self) -> Result<Option<PathBuf>, CheckpointError> {
        let Some(InFlight { step, thread }) = self.in_flight.take() else { return Ok(None) };
        thread.join().unwrap_or(Err(CheckpointError::WriterLost { step })).map(Some)
    }

    /// Waits for the checkpoint in flight and ends.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(mut self) -> Result<Option<PathBuf>, CheckpointError> {
        self.wait()
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        // Ends the thread in order; `finish` is there for those who want the result.
        let _ = self.wait();
    }
}
