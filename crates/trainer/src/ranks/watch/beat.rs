//! What a rank says of itself every second, and what follows from it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Beat {
    pub(super) count: u64,
    pub(super) host: String,
    pub(super) pid: u32,
    pub(super) step: u64,
    pub(super) phase: String,
    /// The collective it is in, and since how many seconds.
    pub(super) waits: Option<(String, u64)>,
    /// Seconds since it last entered a phase or a collective, left one, or said that it goes on.
    pub(super) still: u64,
    pub(super) done: bool,
}

impl Beat {
    /// What it does.
    pub(super) fn place(&self) -> String {
        match &self.waits {
            Some((name, _)) => format!("step {}, {}: {name}", self.step, self.phase),
            None => format!("step {}, {}", self.step, self.phase),
        }
    }

    /// Whether it has not moved for so many seconds, or has ended.
    pub(super) fn stands(&self, seconds: u64) -> bool {
        self.done || self.still >= seconds
    }

    /// Which process it is.
    pub(super) fn process(&self) -> String {
        format!("process {} on {}", self.pid, self.host)
    }
}

/// A verdict on the rank `before`, of which `seen` is heard now and `last` was seen before.
pub(super) fn lost(
    before: usize,
    last: &mut (Option<Beat>, Instant),
    seen: Option<Beat>,
    limit: Duration,
) -> Option<String> {
    let silent_s = limit.as_secs();
    match (&last.0, &seen) {
        (Some(beat), Some(now)) if (&beat.host, beat.pid) != (&now.host, now.pid) => {
            let (gone, come) = (beat.process(), now.process());
            return Some(format!("rank {before} ({gone}) is lost: {come} has come in its place"));
        }
        (beat, seen) if beat != seen => *last = (seen.clone(), Instant::now()),
        (Some(beat), _) if !beat.done && last.1.elapsed() > limit => {
            let (process, place) = (beat.process(), beat.place());
            return Some(format!(
                "rank {before} ({process}) is lost: no sign of life for {silent_s} s, last seen at {place}"
            ));
        }
        (None, _) if last.1.elapsed() > limit => {
            return Some(format!("rank {before} is lost: no sign of life for {silent_s} s since the ranks met"));
        }
        _ => {}
    }
    None
}

pub(super) fn list(places: &BTreeMap<usize, Beat>) -> String {
    places.iter().map(|(rank, beat)| format!("rank {rank} at {}", beat.place())).collect::<Vec<_>>().join("; ")
}
