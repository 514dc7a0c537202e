//! Image-text pairs from tar shards, in an order that is a function of seed and position. No libtorch.
//!
//! ```text
//! patterns -> shards -> indices        shards         which bytes are which sample
//! s3://, gs://, az://, https://        remote         fetched whole into a cache, ahead of their use
//! stream position -> sample            order          a pure function of the seed
//! sample -> bytes                      dataset        of the samples that pass the filter
//! bytes -> pixels, ids                 image, text    decode, crop, flip; which caption, clean, tokenise
//! samples -> HostBatch                 loader         threads ahead of the step, in order
//! views of images -> stored features   feature_store  so that each view is encoded once
//! files -> shards                      pack, upkeep   what `blip2 shards` does
//! ```

// The fixture of the integration tests serves the unit tests too.
#[cfg(test)]
extern crate self as blip2_data;
#[cfg(test)]
#[path = "../tests/fixture/mod.rs"]
mod fixture;

mod atomic;
mod dataset;
mod digest_writer;
mod error;
pub mod feature_store;
pub mod image;
mod keyed;
mod loader;
mod order;
mod pack;
mod remote;
mod shards;
mod text;
mod upkeep;

pub use atomic::write_file;
pub use dataset::corpus::Corpus;
pub use dataset::filter::{Bounds, Passed, SampleFilter};
pub use dataset::{Dataset, OpenOptions, RawSample, reindex, rescan};
pub use digest_writer::DigestWriter;
pub use error::{DataError, SampleError, is_disk_full};
pub use image::{
    Augment, DecodeError, EncodeError, Filter, JpegSize, RgbImage, decode, encode_png, evaluate_transform,
    train_transform,
};
pub use loader::collate::HostBatch;
pub use loader::eval::{EvalFeatures, EvalOptions, EvalReader};
pub use loader::sample::{BadSamples, Quarantined};
pub use loader::throughput::{Throughput, ThroughputError, ThroughputOptions, throughput};
pub use loader::timings::Timings;
pub use loader::{BAD_WINDOW, ImageViews, Loader, LoaderOptions};
pub use order::interleave::Interleave;
pub use order::mixture::{Drawn, Mixture, MixtureSet};
pub use order::{Located, Order, OrderError};
pub use pack::{Keep, PackOptions, PackReport, Reading, Reencode, RowProblem, SourceFormat, pack};
pub use remote::{CacheUse, RemoteOptions, Retries, ShardCache};
pub use shards::index::{Digest, Extension, Index, IndexHeader, IndexedSample, IndexedShard, Member};
pub use shards::location::{Location, RemoteUrl, lacks_credentials, redacted, without_credentials};
pub use shards::manifest::write_manifest;
pub use shards::patterns::check_patterns;
pub use shards::scan::{Problem, scan};
pub use shards::shard::Shard;
pub use text::caption::{CaptionRule, CaptionSource, JsonPath, Pick};
pub use text::question::QuestionFields;
pub use text::tokenizer_folder::{SpecialTokens, converted_tokenizer};
pub use text::{Clean, TextEncoder, TextError, clean_caption};
pub use upkeep::repair::{Outcome, RepairReport, RepairedShard, repair};
pub use upkeep::sheet::{Cell, Layout, contact_sheet, keyed_samples};
pub use upkeep::stats::{Stats, Summary, stats};
pub use upkeep::verify::{VerifyReport, verify};
