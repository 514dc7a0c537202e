//! Image-text pairs from tar shards, in an order that is a function of seed and position. No libtorch.
//!
//! ```text
//! patterns -> shards -> indices        patterns, scan, index      which bytes are which sample
//! stream position -> sample            mixture, order             a pure function of the seed
//! sample -> bytes -> pixels, ids       corpus, image, text        decode, crop, flip, clean, tokenise
//! which samples, which caption         filter, caption            decided by the index, or keyed by position
//! samples -> HostBatch                 collate, loader, eval      threads ahead of the step, in order
//! views of images -> stored features   feature_store              so that each view is encoded once
//! folder -> shards                     pack, verify, stats        what `blip2 shards` does
//! ```

// The fixture of the integration tests serves the unit tests too.
#[cfg(test)]
extern crate self as blip2_data;
#[cfg(test)]
#[path = "../tests/fixture/mod.rs"]
mod fixture;

mod atomic;
mod attributes;
mod caption;
mod collate;
mod corpus;
mod dataset;
mod error;
mod eval;
pub mod feature_store;
mod filter;
mod gpt2_files;
pub mod image;
mod index;
mod interleave;
mod keyed;
mod loader;
mod mixture;
mod order;
mod pack;
mod patterns;
mod sample;
mod scan;
mod stats;
mod text;
mod tokenizer_folder;
mod verify;
mod workers;

pub use caption::{CaptionRule, CaptionSource, JsonPath, Pick};
pub use collate::HostBatch;
pub use corpus::Corpus;
pub use dataset::{Dataset, OpenOptions, RawSample, reindex};
pub use error::{DataError, SampleError};
pub use eval::{EvalOptions, EvalReader};
pub use filter::{Bounds, Passed, SampleFilter};
pub use image::{Augment, DecodeError, Filter, RgbImage, decode, evaluate_transform, train_transform};
pub use index::{Extension, Index, IndexHeader, IndexedSample, IndexedShard, Member};
pub use interleave::Interleave;
pub use loader::{ImageViews, Loader, LoaderOptions};
pub use mixture::{Drawn, Mixture, MixtureSet};
pub use order::{Located, Order, OrderError};
pub use pack::{PackOptions, PackReport, RowProblem, pack};
pub use patterns::expand;
pub use sample::{BadSamples, Quarantined};
pub use scan::{Problem, scan};
pub use stats::{Stats, Summary, stats};
pub use text::{Clean, TextEncoder, TextError, clean_caption, converted_tokenizer};
pub use tokenizer_folder::SpecialTokens;
pub use verify::{VerifyReport, verify};
