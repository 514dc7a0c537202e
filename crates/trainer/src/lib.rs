//! Configuration, training loop, checkpoints, telemetry and evaluation.

mod atomic_file;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod encoder;
pub mod error;
pub mod model_files;
mod precision;
pub mod replay;
pub mod run_folder;
pub mod schedule;
pub mod signals;
pub mod telemetry;
pub mod task;

pub use error::Error;
