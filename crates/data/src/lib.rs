//! Image-text pairs from tar shards, in an order that is a function of seed and position. No libtorch.
//!
//! ```text
//! patterns -> shards -> indices        patterns, scan, index      which bytes are which sample
//! stream position -> sample            order                      a pure function of the seed
//! sample -> bytes -> pixels, ids       dataset, image, text       decode, crop, flip, clean, tokenise
//! samples -> HostBatch                 collate, loader, eval      threads ahead of the step, in order
//! folder -> shards                     pack, verify, stats        what `blip2 shards` does
//! shards -> images per second          throughput, timings        what `blip2 bench loader` does
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
mod sample;
mod scan;
mod stats;
mod text;
mod throughput;
mod timings;
mod tokenizer_folder;
mod verify;
mod workers;

pub use collate::HostBatch;
pub use dataset::{Dataset, OpenOptions, RawSample, reindex};
pub use error::{DataError, SampleError};
pub use eval::{EvalOptions, EvalReader};
pub use image::{Augment, DecodeError, Filter, RgbImage, decode, evaluate_transform, train_transform};
pub use index::{Extension, Index, IndexHeader, IndexedSample, IndexedShard, Member};
pub use loader::{Loader, LoaderOptions};
pub use order::{Located, Order, OrderError};
pub use pack::{PackOptions, PackReport, RowProblem, pack};
pub use patterns::expand;
pub use sample::{BadSamples, Quarantined};
pub use scan::{Problem, scan};
pub use stats::{Stats, Summary, stats};
pub use text::{Clean, TextEncoder, TextError, clean_caption, converted_tokenizer};
pub use throughput::{Throughput, ThroughputError, ThroughputOptions, throughput};
pub use timings::Timings;
pub use tokenizer_folder::SpecialTokens;
pub use verify::{VerifyReport, verify};
