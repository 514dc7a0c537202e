//! What `blip2 shards` does with shards that are there: it verifies, repairs and measures them, and shows samples.

pub(crate) mod repair;
pub(crate) mod sheet;
pub(crate) mod stats;
pub(crate) mod verify;
