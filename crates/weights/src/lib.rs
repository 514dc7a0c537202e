//! Weights in and out: Hugging Face names, safetensors, strict audit, export.
//!
//! [`ModelDir`] opens a Hugging Face directory and offers its parts under the names of our parameters; [`SafetensorsDir`] does so for a
//! checkpoint, whose names are already ours. A [`plans`] function then says what that kind of source may lack or have too much, and
//! [`ParamStore::load`](blip2_torchx::params::ParamStore::load) audits and fills. [`save_safetensors`] writes a checkpoint's tensors,
//! [`Export`] a directory that `transformers` loads as it is, and [`inspect`] tells what a path holds.

mod directory;
mod error;
mod export;
mod export_config;
mod export_tokenizer;
mod header;
mod inspect;
mod json_file;
mod load_report;
mod names;
pub mod plans;
mod safetensors_dir;
mod safetensors_file;
mod save;
mod staging;

pub use directory::{ModelDir, ModelKind, Part, PartSource, PartView};
pub use error::{HeaderProblem, WeightsError};
pub use export::{DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, TOKENIZER_FILES};
pub use export_config::ImagePreprocessing;
pub use export_tokenizer::image_token_index;
pub use inspect::{Contents, Inspection, TensorGroup, inspect};
pub use load_report::LoadTable;
pub use names::{Stage, pretraining_head, trained_names};
pub use safetensors_dir::SafetensorsDir;
pub use safetensors_file::SafetensorsFile;
pub use save::{save_safetensors, write_safetensors};
