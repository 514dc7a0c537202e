//! BLIP-2's towers, Q-Former and projection, as tensors in and tensors out.
//!
//! The field tree of every module is the tree of its Hugging Face names, so weights load and leave without a rename table. Losses are
//! elsewhere (`blip2-losses`); what joins both is the trainer's task.

pub mod activation;
pub mod config;
pub mod dropout;
pub mod frozen;
pub mod language;
pub mod layers;
pub mod qformer;
pub mod stage1;
pub mod stage2;
pub mod vision;

pub use activation::Activation;
pub use config::{Blip2Config, ConfigError};
pub use dropout::Dropout;
pub use frozen::Frozen;
pub use stage1::Stage1;
pub use stage2::{Stage2, Stage2Texts};
