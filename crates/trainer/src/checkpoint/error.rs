//! What can go wrong with a checkpoint.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use blip2_data::is_disk_full;
use thiserror::Error;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file of a new checkpoint cannot be written; the checkpoints before it are untouched.
    #[error(
        "{}: the checkpoint cannot be written: {source}; {}the checkpoints before it are untouched",
        path.display(), if *disk_full { "free some space, " } else { "" }
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// Whether there is no space left.
        disk_full: bool,
        /// What the writer said.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A file or folder of the store cannot be read or changed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A folder that a whole checkpoint would have a manifest in.
    #[error("{}: expected a checkpoint with MANIFEST.json, got none", path.display())]
    NoManifest {
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// The manifest is not one.
    #[error("{}: expected a checkpoint's manifest, got {reason}", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not what the manifest says.
    #[error("{}: expected {expected}, got {got}; the file is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Length or digest in the manifest.
        expected: String,
        /// Length or digest of the file.
        got: String,
    },
    /// The state of training cannot be read or written.
    #[error("{}: {reason}", path.display())]
    State {
        /// The state's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A run without a checkpoint.
    #[error("{}: expected a run with a checkpoint, found none; train it first", run.display())]
    NoneYet {
        /// The run's folder.
        run: PathBuf,
    },
    /// A run of whose checkpoints none is whole.
    #[error("{}: every checkpoint of this run is damaged; the newest: {newest}", run.display())]
    AllDamaged {
        /// The run's folder.
        run: PathBuf,
        /// What is wrong with the newest one.
        newest: Box<CheckpointError>,
    },
    /// The writer thread ended without a result.
    #[error("the checkpoint of step {step} was not written: its thread panicked")]
    WriterLost {
        /// The step.
        step: u64,
    },
}

impl CheckpointError {
    /// Whether the machine failed, which says nothing of what the checkpoint's files hold.
    pub(crate) fn is_of_this_machine(&self) -> bool {
        use io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
        let of_files = [InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof];
        matches!(self, Self::Io { source, .. } if !of_files.contains(&source.kind()))
    }

    pub(super) fn write(path: &Path, source: Box<dyn StdError + Send + Sync>) -> Self {
        Self::Write { path: path.to_path_buf(), disk_full: says_disk_full(source.as_ref()), source }
    }

    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Whether the system said, however deep inside, that there is no space left on the disk or for this user.
fn says_disk_full(error: &(dyn StdError + 'static)) -> bool {
    error.downcast_ref().is_some_and(is_disk_full) || error.source().is_some_and(says_disk_full)
}
