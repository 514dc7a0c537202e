//! `state.json`: everything a run needs to go on that is not a tensor.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use blip2_data::BadSamples;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::CheckpointError;
use super::folder::CheckpointFolder;
use super::manifest::{Checkpoint, Metric};
use crate::run::meter::Unrecorded;

const STATE: &str = "state.json";
const FORMAT: u32 = 1;
/// A key of older checkpoints that nothing reads: all numbers of chance are keyed, or a step begins their generator anew.
const GENERATORS: &str = "rng";

/// The state of training after `step` optimizer steps. Tensors, those of the gradient scaler included, lie beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    format: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// First position of the training data that has not been trained on.
    pub stream_position: u64,
    /// Samples that were found unreadable and are not tried again.
    pub bad_samples: BadSamples,
    /// Digest of every configuration key that may not change.
    pub config_digest: String,
    /// Digest of the training data's manifests.
    pub dataset_digest: String,
    /// Digest of the held-out data's manifests, where there is such data.
    #[serde(default)]
    pub held_out_digest: Option<String>,
    /// What tells the frozen towers' weights from others, by the keys that name them; nothing in older checkpoints.
    #[serde(default)]
    pub frozen_weights: BTreeMap<String, String>,
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

impl TrainState {
    /// The state of a run before its first step.
    pub fn new(config_digest: String, dataset_digest: String) -> Self {
        Self {
            format: FORMAT,
            step: 0,
            stream_position: 0,
            bad_samples: BadSamples::default(),
            config_digest,
            dataset_digest,
            held_out_digest: None,
            frozen_weights: BTreeMap::new(),
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
        let mut value: Value = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        // Before the other keys: those of another format may well differ.
        if value["format"] != FORMAT {
            return Err(bad(format!("expected format {FORMAT}, got {}", value["format"])));
        }
        if let Some(state) = value.as_object_mut() {
            state.remove(GENERATORS);
        }
        serde_json::from_value(value).map_err(|error| bad(error.to_string()))
    }
}
