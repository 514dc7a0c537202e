//! Tar shards: which there are, where they lie, and which bytes of them are which sample.

pub(crate) mod index;
pub(crate) mod location;
pub(crate) mod manifest;
pub(crate) mod members;
pub(crate) mod patterns;
pub(crate) mod scan;
pub(crate) mod shard;
