//! Configuration, training loop, checkpoints, telemetry and evaluation.

pub mod config;
