//! What the shard cache was good for.

use std::ops::AddAssign;

use serde::Serialize;

/// What a set's use of the shard cache came to, since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct CacheUse {
    /// Shards that were opened for a sample.
    pub opened: u64,
    /// Those of them that did not have to be fetched then: they were there, or others were fetching them.
    pub hits: u64,
    /// Shards that were fetched, for a sample, ahead of it, or to index them.
    pub fetched: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Seconds from a sample's need of a shard to its being there, over all that were opened.
    pub wait_s: f64,
}

impl AddAssign for CacheUse {
    fn add_assign(&mut self, other: CacheUse) {
        self.opened += other.opened;
        self.hits += other.hits;
        self.fetched += other.fetched;
        self.fetched_bytes += other.fetched_bytes;
        self.wait_s += other.wait_s;
    }
}
