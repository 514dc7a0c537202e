//! What `blip2 shards` does: the data crate's functions on shards, for a program that knows the trainer alone.

pub use blip2_data::{
    Clean, DataError, Dataset, IndexedShard, Keep, Layout, OpenOptions, Outcome, PackOptions, PackReport, Reading,
    Reencode, RepairReport, RepairedShard, SourceFormat, Stats, Summary, VerifyReport, contact_sheet, encode_png,
    keyed_samples, pack, reindex, repair, stats, verify,
};
