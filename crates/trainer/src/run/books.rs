//! What a run leaves behind: its folder, its checkpoints, its metrics. The first rank keeps them.

use std::fmt::Display;

use serde::Serialize;

use crate::checkpoint::CheckpointWriter;
use crate::error::Error;
use crate::run::folder::RunFolder;
use crate::run::quarantine::Quarantine;
use crate::telemetry::Telemetry;

/// The run's folder with all that is written into it.
pub(super) struct Books {
    pub folder: RunFolder,
    pub writer: CheckpointWriter,
    pub telemetry: Telemetry,
    pub quarantine: Quarantine,
}

impl Books {
    /// Writes samples down that cannot be used.
    pub fn quarantine<T: Serialize + Display>(&mut self, found: &[T]) -> Result<(), Error> {
        if let Some(line) = self.quarantine.append(found)? {
            self.telemetry.note(&line);
        }
        Ok(())
    }

    /// Whether no checkpoint of this step is there.
    pub fn lacks_checkpoint(&mut self, step: u64) -> Result<bool, Error> {
        self.writer.wait()?;
        Ok(step > 0 && !self.writer.store().steps()?.contains(&step))
    }

    /// Ends the run behind `step`, for good where it is `finished` with so many steps.
    pub fn close(&mut self, step: u64, finished: Option<u64>) -> Result<(), Error> {
        self.writer.wait()?;
        match finished {
            Some(steps) => self.folder.mark_finished(steps)?,
            None => self.telemetry.note(&format!("stopped after step {step}; the same command goes on from there")),
        }
        Ok(self.telemetry.sync()?)
    }
}

impl Drop for Books {
    /// A checkpoint in flight is written to its end, however the run ends.
    fn drop(&mut self) {
        let _ = self.writer.wait();
    }
}
