//! Image-text pairs from tar shards, in an order that is a function of seed and position. No libtorch.
//!
//! ```text
//! patterns -> shards -> indices        patterns, shard, scan, index, manifest    which bytes are which sample
//! s3://, gs://, az://, https://        location, remote           fetched whole into a cache, ahead of their use
//! stream position -> sample            mixture, order             a pure function of the seed
//! sample -> bytes -> pixels, ids       corpus, image, text        decode, crop, flip, clean, tokenise
//! which samples, which caption         filter, caption, question  decided by the index, or keyed by position
//! samples -> HostBatch                 collate, loader, eval      threads ahead of the step, in order
//! views of images -> stored features   feature_store              so that each view is encoded once
//! files -> shards                      pack, verify, repair        what `blip2 shards` does
//!                                      stats, sheet
//! shards -> images per second          throughput, timings        what `blip2 bench loader` does
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
mod digest_writer;
mod error;
mod eval;
pub mod feature_store;
mod filter;
mod gpt2_files;
pub mod image;
mod index;
mod interleave;
mod keyed;
mod lanes;
mod loaded;
mod loader;
mod location;
mod manifest;
mod measure;
mod members;
mod mixture;
mod order;
mod pack;
mod patterns;
mod question;
mod remote;
mod repair;
mod sample;
mod scan;
mod sentencepiece;
mod shard;
mod sheet;
mod stats;
mod text;
mod throughput;
mod timings;
mod tokenizer_folder;
mod verify;
mod workers;

pub use atomic::write_file;
pub use caption::{CaptionRule, CaptionSource, JsonPath, Pick};
pub use collate::HostBatch;
pub use corpus::Corpus;
pub use dataset::{Dataset, OpenOptions, RawSample, reindex};
pub use digest_writer::DigestWriter;
pub use error::{DataError, SampleError, is_disk_full};
pub use eval::{EvalFeatures, EvalOptions, EvalReader};
pub use filter::{Bounds, Passed, SampleFilter};
pub use image::{
    Augment, DecodeError, EncodeError, Filter, RgbImage, decode, encode_png, evaluate_transform, train_transform,
};
pub use index::{Digest, Extension, Index, IndexHeader, IndexedSample, IndexedShard, Member};
pub use interleave::Interleave;
pub use loader::{BAD_WINDOW, ImageViews, Loader, LoaderOptions};
pub use location::{Location, RemoteUrl, lacks_credentials, without_credentials};
pub use manifest::write_manifest;
pub use mixture::{Drawn, Mixture, MixtureSet};
pub use order::{Located, Order, OrderError};
pub use pack::{Keep, PackOptions, PackReport, Reading, Reencode, RowProblem, SourceFormat, pack};
pub use patterns::check_patterns;
pub use question::QuestionFields;
pub use remote::{CacheUse, RemoteOptions, Retries, ShardCache};
pub use repair::{Outcome, RepairReport, RepairedShard, repair};
pub use sample::{BadSamples, Quarantined};
pub use scan::{Problem, scan};
pub use shard::Shard;
pub use sheet::{Cell, Layout, contact_sheet, keyed_samples};
pub use stats::{Stats, Summary, stats};
pub use text::{Clean, TextEncoder, TextError, clean_caption};
pub use throughput::{Throughput, ThroughputError, ThroughputOptions, throughput};
pub use timings::Timings;
pub use tokenizer_folder::{SpecialTokens, converted_tokenizer};
pub use verify::{VerifyReport, verify};
