//! Where to compute, for a program that knows the trainer alone.

pub use blip2_torchx::device::{DeviceChoice, load_cuda, select, select_for};
pub use tch::Device;
