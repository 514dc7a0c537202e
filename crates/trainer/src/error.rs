//! What can stop a run, a replay or an evaluation.

use std::fmt::Display;
use std::path::PathBuf;

use blip2_torchx::params::LoadError;
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
    Load(#[from] LoadError),
    /// Several parts whose tensors are not what their files hold, a line each.
    #[error("{}", lines(.0))]
    Loads(Vec<LoadError>),
    #[error(transparent)]
    Torch(#[from] blip2_torchx::Error),
    #[error(transparent)]
    Tensor(#[from] tch::TchError),
    #[error(transparent)]
    RunFolder(#[from] crate::run::folder::RunFolderError),
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    #[error(transparent)]
    Telemetry(#[from] crate::telemetry::TelemetryError),
    #[error(transparent)]
    Retrieval(#[from] blip2_metrics::RetrievalError),
    #[error(transparent)]
    Captions(#[from] blip2_metrics::CaptionError),
    #[error("{path}: {source}")]
    Model { path: PathBuf, source: blip2_model::ConfigError },
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    /// A key whose value does not fit what the program finds: another key, a file, the number of ranks, the device.
    #[error("{key}: expected {expected}, got {got}{}", behind(.advice))]
    Key { key: String, expected: String, got: String, advice: String },
    /// Pictures are asked of a batch that was read for its stored features.
    #[error("a batch without pixels")]
    NoPixels,
    /// The data is not what the run began with.
    #[error(
        "{key}: other shards than the run began with, or other samples of them that pass the filter; give the same, or begin a new run under another run.name ({run})"
    )]
    OtherData { key: &'static str, run: String },
    /// A checkpoint that was named belongs to another run.
    #[error(
        "{}: expected a checkpoint of this configuration, got one of another; name its weights in model.qformer.init of a new run to begin from them",
        checkpoint.display()
    )]
    OtherRun { checkpoint: PathBuf },
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
    pub fn file(path: impl Into<PathBuf>, message: impl Display) -> Error {
        Error::File { path: path.into(), message: message.to_string() }
    }

    /// A key whose value does not fit, with what to do about it where that is not plain.
    pub(crate) fn key(key: impl Into<String>, expected: impl Display, got: impl Display, advice: &str) -> Error {
        Error::Key { key: key.into(), expected: expected.to_string(), got: got.to_string(), advice: advice.to_owned() }
    }
}

fn behind(advice: &str) -> String {
    if advice.is_empty() { String::new() } else { format!("; {advice}") }
}

fn lines(errors: &[LoadError]) -> String {
    errors.iter().map(LoadError::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_named_with_what_was_expected_and_what_to_do() {
        let error = |advice| Error::key("run.device", "a GPU", 3, advice).to_string();
        assert_eq!(error(""), "run.device: expected a GPU, got 3");
        assert_eq!(error("set cpu"), "run.device: expected a GPU, got 3; set cpu");
    }
}
