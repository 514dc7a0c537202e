//! Configuration, training loop, checkpoints, telemetry and evaluation.

mod assembly;
pub mod bench;
pub mod captioner;
pub mod checkpoint;
pub mod config;
mod data;
pub mod device;
mod error;
pub mod evaluation;
pub mod export;
mod features;
pub mod fit;
pub mod hub;
mod masks;
mod packing_speed;
mod precision;
pub mod ranks;
pub mod replay;
mod run;
pub mod shards;
pub mod step;
pub mod task;
pub mod telemetry;
pub mod train;

pub use assembly::{blueprint, model_files, preprocessing};
pub use blip2_weights::{Inspection, inspect};
pub use data::{batch, framed, text};
pub use error::Error;
pub use features::{cache as feature_cache, encoder};

/// The libtorch that this program is built for.
pub(crate) const LIBTORCH_VERSION: &str = "2.11.0";
