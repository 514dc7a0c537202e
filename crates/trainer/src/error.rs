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
    /// Several mistakes, each beginning a line.
    #[error("{}", lines(.0))]
    Several(Vec<Error>),
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

fn lines(errors: &[Error]) -> String {
    errors.iter().map(Error::to_string).collect::<Vec<_>>().join("\n")
}

/// Mistakes that are looked for one after the other and told together.
#[derive(Debug, Default)]
pub(crate) struct Mistakes(Vec<Error>);

impl Mistakes {
    /// What was found, or `None` and a mistake more.
    pub fn take<T>(&mut self, found: Result<T, Error>) -> Option<T> {
        found.map_err(|error| self.0.push(error)).ok()
    }

    /// The only mistake, or all of them as one error.
    pub fn into_error(mut self) -> Error {
        if self.0.len() == 1 { self.0.remove(0) } else { Error::Several(self.0) }
    }

    /// Nothing where there is no mistake.
    ///
    /// # Errors
    /// All that there are.
    pub fn into_result(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(self.into_error()) }
    }
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

    #[test]
    fn mistakes_are_told_together() {
        let mut mistakes = Mistakes::default();
        assert_eq!(mistakes.take(Ok(7)), Some(7));
        assert_eq!(mistakes.take(Err::<(), _>(Error::NoPixels)), None);
        assert!(matches!(mistakes.into_result(), Err(Error::NoPixels)));
        let mut mistakes = Mistakes::default();
        for key in ["a", "b"] {
            mistakes.take(Err::<(), _>(Error::key(key, 1, 2, "")));
        }
        assert_eq!(mistakes.into_result().unwrap_err().to_string(), "a: expected 1, got 2\nb: expected 1, got 2");
        Mistakes::default().into_result().unwrap();
    }
}
