//! Shards that lie elsewhere: fetched whole into a cache of files, from where they are read like local ones.
//!
//! ```text
//! network     one thread that talks to stores; requests, their answers and what went wrong
//! retry       how often and how long faults are borne
//! fetch       an object into a file, resumed after faults, its length and digest checked
//! cache       files with names that say what is in them, locked while in use, evicted by last use
//! background  fetches of what is needed next
//! room        who holds files of a cache, and how they give way
//! shared      from a shard to its file, out of all these
//! store       all of it, as the rest of the crate sees it
//! ```

#[cfg(not(feature = "remote"))]
mod absent;
#[cfg(feature = "remote")]
mod background;
#[cfg(feature = "remote")]
mod cache;
#[cfg(feature = "remote")]
mod fetch;
#[cfg(feature = "remote")]
mod network;
mod options;
#[cfg(feature = "remote")]
mod retry;
#[cfg(feature = "remote")]
mod room;
#[cfg(feature = "remote")]
mod shared;
#[cfg(feature = "remote")]
mod store;
mod usage;

#[cfg(not(feature = "remote"))]
pub(crate) use absent::Remote;
pub use options::{RemoteOptions, Retries, ShardCache};
#[cfg(feature = "remote")]
pub(crate) use store::Remote;
pub use usage::CacheUse;

use crate::shards::location::RemoteUrl;

/// An object of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) url: RemoteUrl,
    /// Where a listing told.
    pub(crate) version: Option<Version>,
}

impl Object {
    pub(crate) fn named(url: RemoteUrl) -> Object {
        Object { url, version: None }
    }
}

/// What says that an object is still the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) bytes: u64,
    /// Web servers need not have one.
    pub(crate) etag: Option<Box<str>>,
}
