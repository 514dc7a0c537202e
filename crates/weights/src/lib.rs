//! Weights in and out: Hugging Face and LAVIS names, safetensors and PyTorch files, strict audit, export.
//!
//! [`ModelDir`] opens a Hugging Face directory or a checkpoint of LAVIS and offers its parts under the names of our parameters;
//! [`WeightsDir`] does so for a checkpoint of ours. Files are [`SafetensorsFile`] or [`TorchFile`], which reads a pickle without executing any of
//! it. A [`plans`] function then says what that kind of source may lack or have too much, and
//! [`ParamStore::load`](blip2_torchx::params::ParamStore::load) audits and fills. [`save_safetensors`] writes a checkpoint's tensors,
//! [`Export`] a directory that `transformers` loads as it is, [`save_lavis`] a checkpoint that LAVIS loads, and [`inspect`] tells what a path
//! holds.

mod directory;
mod error;
mod export;
mod export_config;
mod export_tokenizer;
mod file_map;
mod frozen_elsewhere;
mod header;
mod inspect;
mod json_file;
mod lavis;
mod layouts;
mod load_report;
mod names;
mod part_view;
pub mod plans;
mod safetensors_file;
mod save;
mod staging;
mod tied_head;
mod torch_file;
mod weights_dir;
mod weights_file;

pub use directory::{ModelDir, ModelKind, Part, PartSource};
pub use error::{HeaderProblem, WeightsError};
pub use export::{DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, TOKENIZER_FILES, Towers};
pub use export_config::{ImagePreprocessing, with_all_ends};
pub use export_tokenizer::{image_token_index, is_pad_token, names_image_token};
pub use frozen_elsewhere::FrozenElsewhere;
pub use inspect::{Contents, Inspection, TensorGroup, inspect};
pub use lavis::{LavisCheckpoint, Projection, save_lavis};
pub use load_report::{LoadTable, unused_modules};
pub use names::{Stage, pretraining_head, trained_names};
pub use part_view::PartView;
pub use safetensors_file::SafetensorsFile;
pub use save::{save_safetensors, write_safetensors};
pub use torch_file::{TorchFile, TorchFileProblem};
pub use weights_dir::{WEIGHT_FILES, WeightsDir, read_shard_index};
pub use weights_file::WeightsFile;
