//! `state.json`: everything a run needs to go on that is not a tensor.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::Value;

use super::error::CheckpointError;
use super::folder::CheckpointFolder;
use super::manifest::{Checkpoint, Metric};
use crate::meter::Unrecorded;

const STATE: &str = "state.json";
const FORMAT: u32 = 1;

/// The state of training after `step` optimizer steps. Tensors, those of the gradient scaler included, lie beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    format: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// First position of the training data that has not been trained on.
    pub stream_position: u64,
    /// Samples that were found unreadable and are not tried again, as the data crate writes them.
    pub bad_samples: Value,
    /// States of the random number generators, by device.
    pub rng: BTreeMap<String, RngState>,
    /// Digest of every configuration key that may not change.
    pub config_digest: String,
    /// Digest of the training data's manifests.
    pub dataset_digest: String,
    /// Digest of the held-out data's manifests, where there is such data.
    #[serde(default)]
    pub held_out_digest: Option<String>,
    /// The best held-out metric so far.
    pub best: Option<Best>,
    /// Whether an evaluation was due behind this step that a signal came before: it is made when the run goes on.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Metrics of the steps behind the last record.
    #[serde(default)]
    pub unrecorded: Unrecorded,
}

/// A metric's best value and when it was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The metric.
    #[serde(flatten)]
    pub metric: Metric,
    /// Step at which it was measured.
    pub step: u64,
}

/// Bytes of a random number generator's state; in the file as hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngState(pub Vec<u8>);

impl TrainState {
    /// The state of a run before its first step.
    pub fn new(config_digest: String, dataset_digest: String) -> Self {
        Self {
            format: FORMAT,
            step: 0,
            stream_position: 0,
            bad_samples: Value::Null,
            rng: BTreeMap::new(),
            config_digest,
            dataset_digest,
            held_out_digest: None,
            best: None,
            evaluation_due: false,
            unrecorded: Unrecorded::default(),
        }
    }

    /// Writes the state into a checkpoint.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &mut CheckpointFolder) -> Result<(), CheckpointError> {
        folder.file(STATE, |out| serde_json::to_writer_pretty(out, self).map_err(io::Error::from))
    }

    /// Reads the state of a checkpoint.
    ///
    /// # Errors
    /// The file is missing, of another format, or not a state.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let path = checkpoint.file(STATE);
        let bytes = fs::read(&path).map_err(CheckpointError::io(&path))?;
        let bad = |reason: String| CheckpointError::State { path: path.clone(), reason };
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        // Before the other keys: those of another format may well differ.
        if value["format"] != FORMAT {
            return Err(bad(format!("expected format {FORMAT}, got {}", value["format"])));
        }
        serde_json::from_value(value).map_err(|error| bad(error.to_string()))
    }
}

impl Serialize for RngState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digits = self.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        serializer.serialize_str(&digits)
    }
}

impl<'de> Deserialize<'de> for RngState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect::<Option<Vec<u8>>>();
        match digits {
            Some(digits) if digits.len() % 2 == 0 => {
                Ok(Self(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
            }
            _ => Err(D::Error::custom("expected pairs of hexadecimal digits")),
        }
    }
}
