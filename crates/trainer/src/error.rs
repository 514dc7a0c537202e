//! What can stop a run, a replay or an evaluation.

use std::path::PathBuf;

use thiserror::Error;

/// Anything that stops the trainer.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the variants say what their messages say
pub enum Error {
    #[error(transparent)]
    Config(#[from] crate::config::ConfigErrors),
    #[error(transparent)]
    Data(#[from] blip2_data::DataError),
    #[error("{key}: {source}")]
    DataSet { key: String, source: blip2_data::DataError },
    #[error(transparent)]
    Text(#[from] blip2_data::TextError),
    #[error(transparent)]
    Weights(#[from] blip2_weights::WeightsError),
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    #[error(transparent)]
    Load(#[from] blip2_torchx::params::LoadError),
    #[error(transparent)]
    Torch(#[from] blip2_torchx::Error),
    #[error(transparent)]
    RunFolder(#[from] crate::run_folder::RunFolderError),
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    #[error(transparent)]
    Telemetry(#[from] crate::telemetry::TelemetryError),
    #[error(transparent)]
    Retrieval(#[from] blip2_metrics::RetrievalError),
    #[error("{path}: {source}")]
    Model { path: PathBuf, source: blip2_model::ConfigError },
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    /// Non-finite steps, one after the other.
    #[error(
        "{steps} steps in a row were not finite, the last at step {step}; batches and weights are in {folder}: look with `blip2 replay`, then lower optimizer.lr, set optimizer.clip_norm or use run.precision: fp32"
    )]
    NotFinite { steps: u64, step: u64, folder: PathBuf },
    /// Another rank ended, was lost or hangs.
    #[error("{0}")]
    RankLost(String),
    /// Parts that do not fit each other; the message names the keys.
    #[error("{0}")]
    Mismatch(String),
}

impl Error {
    /// A file that cannot be used, with the reason.
    pub fn file(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Error {
        Error::File { path: path.into(), message: message.to_string() }
    }
}
