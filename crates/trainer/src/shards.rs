//! What `blip2 shards` does: the data crate's functions on shards, for a program that knows the trainer alone.

pub use blip2_data::{
    CaptionRule, CaptionSource, Clean, DataError, Dataset, JsonPath, Keep, Layout, OpenOptions, Outcome, PackOptions,
    PackReport, Reading, Reencode, RemoteOptions, RepairReport, RepairedShard, Retries, Shard, ShardCache,
    SourceFormat, Stats, Summary, VerifyReport, contact_sheet, encode_png, keyed_samples, pack, reindex, repair,
    rescan, stats, verify, write_file, write_manifest,
};
