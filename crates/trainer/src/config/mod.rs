//! The configuration file: one YAML file is one stage of one run.
//!
//! `types.rs` lists every key with its type, default and range. A file is read along that list and every mistake is
//! collected ([`ConfigErrors`]), before a device is touched. Relative paths are relative to the current directory.

mod contradictions;
mod diff;
mod error;
mod leaves;
mod load;
mod node;
mod overrides;
mod reader;
mod reference;
mod source;
#[cfg(test)]
mod tests;
mod types;
mod validate;
mod value;

pub use diff::{Change, Difference};
pub use error::{ConfigError, ConfigErrors, Problem};
pub use types::*;
