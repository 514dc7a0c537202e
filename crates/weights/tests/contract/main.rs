//! The crate's contract: files in, files out, and every way in which a file can be wrong.

mod directories;
mod exported_tokenizers;
mod exports;
mod fixtures;
mod hostile_files;
mod hostile_torch_files;
mod inspection;
mod lavis;
mod load_plans;
mod saving;
mod shards;
mod torch_bytes;
mod torch_files;
