//! How shards that lie elsewhere are fetched and kept.

use std::path::PathBuf;
use std::time::Duration;

/// How shards that lie elsewhere are fetched and kept.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// Where fetched shards are kept; without it there can be no remote shard.
    pub cache: Option<ShardCache>,
    /// How faults are borne.
    pub retries: Retries,
    /// Shards that are fetched side by side ahead of their use, and indexed side by side.
    pub parallel: usize,
    /// Settings of the stores that go before the environment's, as `aws_endpoint`.
    pub settings: Vec<(String, String)>,
}

/// A folder for fetched shards; processes of one machine can share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardCache {
    /// The folder; it is made where it is missing.
    pub dir: PathBuf,
    /// All shards in it take at most this.
    pub max_bytes: u64,
}

/// Bounds of what is tried before a shard counts as unreadable. They hold from one byte that arrived to the next, so
/// that a slow connection is no fault. By default time alone is bounded: requests that fail at once use up any number of
/// tries in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Requests that bring nothing.
    pub tries: u32,
    /// Time without a new byte, over all tries.
    pub give_up: Duration,
    /// Time without an answer or a new byte, of one request.
    pub timeout: Duration,
    /// The wait after the first fault; it doubles with each, up to a hundred times this, and varies by chance.
    pub first_wait: Duration,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self { cache: None, retries: Retries::default(), parallel: 8, settings: Vec::new() }
    }
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            tries: u32::MAX,
            give_up: Duration::from_secs(300),
            timeout: Duration::from_secs(30),
            first_wait: Duration::from_millis(200),
        }
    }
}
