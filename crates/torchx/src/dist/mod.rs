//! Several processes that train one model: libtorch's own engine, c10d.
//!
//! A [`Store`] is where processes find each other, a [`Group`] what they compute with together, and a [`Reducer`]
//! averages their gradients while the backward pass goes on. Stores, groups and their names on the wire are those of
//! `torch.distributed`, so `torchrun` can serve the store.

mod group;
mod reducer;
mod store;

use std::time::Duration;

pub use group::{Group, NCCL_LIBRARY, Reduce};
pub use reducer::{Reducer, ReducerOptions};
pub use store::Store;

/// Whole milliseconds, at least one: c10d takes zero for no limit.
fn milliseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX / 2_000_000).clamp(1, i64::MAX / 2_000_000)
}

/// One line of an exception's text.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}
