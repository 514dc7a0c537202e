//! What tch does not bind of libtorch: parameters, optimizer, autocast, dropout, device control, process groups.
//!
//! The only crate with unsafe code and C++. The C++ side (`csrc/`) is a set of plain C functions that catch every
//! exception; the Rust side is safe. Functions that answer with a [`Result`] can fail on what a user gives; the others
//! panic on misuse with libtorch's own words, as tch's operators do.

pub mod adamw;
pub mod attention;
pub mod autocast;
pub mod device;
pub mod dist;
pub mod dropout;
pub mod error;
mod ffi;
pub mod foreach;
pub mod grad_scaler;
pub mod isa;
pub mod layer_norm;
pub mod mapped_file;
pub mod memory;
pub mod params;
pub mod pinned;
pub mod process;
pub mod rng;
pub mod sdpa;
pub mod tf32;

pub use adamw::{AdamW, AdamWConfig};
pub use autocast::autocast;
pub use device::DeviceChoice;
pub use error::Error;
pub use grad_scaler::GradScaler;
pub use mapped_file::MappedFile;
