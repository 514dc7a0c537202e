//! Image-text pairs from tar shards, in an order that is a function of seed and position. No libtorch.
//!
//! ```text
//! patterns -> shards -> indices        patterns, scan, index      which bytes are which sample
//! stream position -> sample            order                      a pure function of the seed
//! sample -> bytes -> pixels, ids       dataset, image, text       decode, crop, flip, clean, tokenise
//! samples -> HostBatch                 collate, loader, eval      threads ahead of the step, in order
//! files -> shards                      pack, verify, repair        what `blip2 shards` does
//!                                      stats, sheet
//! ```

// The fixture of the integration tests serves the unit tests too.
#[cfg(test)]
extern crate self as blip2_data;
#[cfg(test)]
#[path = "../tests/fixture/mod.rs"]
mod fixture;

mod atomic;
mod collate;
mod dataset;
mod error;
mod eval;
mod gpt2_files;
pub mod image;
mod index;
mod keyed;
mod loader;
mod order;
mod pack;
mod patterns;
mod repair;
mod sample;
mod scan;
mod sheet;
mod stats;
mod text;
mod tokenizer_folder;
mod verify;
mod workers;

pub use collate::HostBatch;
pub use dataset::{Dataset, OpenOptions, RawSample, reindex};
pub use error::{DataError, SampleError};
pub use eval::{EvalOptions, EvalReader};
pub use image::{
    Augment, DecodeError, EncodeError, Filter, RgbImage, decode, encode_png, evaluate_transform, train_transform,
};
pub use index::{Extension, Index, IndexHeader, IndexedSample, IndexedShard, Member};
pub use loader::{Loader, LoaderOptions};
pub use order::{Located, Order, OrderError};
pub use pack::{Keep, PackOptions, PackReport, Reading, Reencode, RowProblem, SourceFormat, pack};
pub use patterns::expand;
pub use repair::{Outcome, RepairReport, RepairedShard, repair};
pub use sample::{BadSamples, Quarantined};
pub use scan::{Problem, scan};
pub use sheet::{Cell, Layout, contact_sheet, keyed_samples};
pub use stats::{Stats, Summary, stats};
pub use text::{Clean, TextEncoder, TextError, clean_caption, converted_tokenizer};
pub use tokenizer_folder::SpecialTokens;
pub use verify::{VerifyReport, verify};
