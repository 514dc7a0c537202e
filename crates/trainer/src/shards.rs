//! What `blip2 shards` does: the data crate's functions on shards, for a program that knows the trainer alone.

pub use blip2_data::{
    Clean, DataError, Dataset, OpenOptions, PackOptions, PackReport, RemoteOptions, Shard, ShardCache, Stats, Summary,
    VerifyReport, pack, reindex, stats, verify, write_manifest,
};
