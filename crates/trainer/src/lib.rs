//! Configuration, training loop, checkpoints, telemetry and evaluation.

pub mod assembly;
mod atomic_file;
mod bad_step;
pub mod batch;
pub mod bench;
pub mod blueprint;
pub mod captioner;
pub mod checkpoint;
pub mod config;
pub mod data;
mod data_sets;
mod declared;
pub mod device;
mod disk_features;
pub mod encoder;
pub mod error;
pub mod evaluate;
pub mod evaluation;
pub mod export;
pub mod feature_cache;
pub mod features;
pub mod fit;
pub mod framed;
pub mod hub;
pub mod index_lines;
pub mod language;
pub mod loading;
mod masks;
pub mod memory_features;
pub mod meter;
pub mod model_files;
mod precision;
pub mod prefix;
pub mod preprocessing;
pub mod qformer_init;
mod quarantine;
pub mod ranks;
pub mod replay;
pub mod run;
pub mod run_folder;
pub mod schedule;
pub mod shards;
pub mod signals;
pub mod snapshot;
pub mod step;
mod stored_numbers;
pub mod task;
pub mod telemetry;
pub mod text;
pub mod train;
mod vision_layer;

pub use blip2_weights::{Inspection, inspect};
pub use error::Error;

/// The libtorch that this program is built for.
pub const LIBTORCH_VERSION: &str = "2.11.0";
