//! What `blip2 shards` does: the data crate's functions on shards, for a program that knows the trainer alone.

pub use blip2_data::{
    CaptionRule, CaptionSource, Clean, DataError, Dataset, IndexedShard, JsonPath, OpenOptions, PackOptions,
    PackReport, Stats, Summary, VerifyReport, pack, reindex, stats, verify,
};
