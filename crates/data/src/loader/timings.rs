//! Where the time of preparing samples goes: counters that every thread adds to, two clock readings a phase.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

/// A part of preparing a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Bytes from the shard.
    Read,
    /// Cleaning and tokenising the caption.
    Text,
    /// From the image file to pixels.
    Decode,
    /// Crop, resize, flip and planes.
    Resize,
}

/// What the threads of a loader add to.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    samples: AtomicU64,
    image_bytes: AtomicU64,
    /// Nanoseconds by [`Phase`].
    spent_ns: [AtomicU64; 4],
}

impl Counters {
    /// Runs `job` and adds its time to `phase`, also when it fails; not when it panics.
    pub(crate) fn time<T>(&self, phase: Phase, job: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = job();
        self.spent_ns[phase as usize].fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Counts a sample that was prepared from an image file of so many bytes.
    pub(crate) fn prepared(&self, image_bytes: usize) {
        self.samples.fetch_add(1, Ordering::Relaxed);
        self.image_bytes.fetch_add(image_bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Timings {
        let seconds = |phase: Phase| self.spent_ns[phase as usize].load(Ordering::Relaxed) as f64 / 1e9;
        Timings {
            samples: self.samples.load(Ordering::Relaxed),
            image_bytes: self.image_bytes.load(Ordering::Relaxed),
            read_s: seconds(Phase::Read),
            text_s: seconds(Phase::Text),
            decode_s: seconds(Phase::Decode),
            resize_s: seconds(Phase::Resize),
        }
    }
}

/// What a loader's threads have done so far, and the seconds they took for it together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Samples prepared, those decoded ahead included; bad ones are not counted, but their time is.
    pub samples: u64,
    /// Length of their image files.
    pub image_bytes: u64,
    /// Reading from the shards.
    pub read_s: f64,
    /// Cleaning and tokenising captions.
    pub text_s: f64,
    /// Decoding image files.
    pub decode_s: f64,
    /// Crop, resize, flip and planes.
    pub resize_s: f64,
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_add_up() {
        let counters = Counters::default();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    counters.time(Phase::Decode, || thread::sleep(Duration::from_millis(20)));
                    counters.prepared(100);
                });
            }
        });
        let timings = counters.read();
        assert_eq!((timings.samples, timings.image_bytes), (3, 300));
        assert!(timings.decode_s >= 0.06, "{timings:?}");
        assert_eq!((timings.read_s, timings.text_s, timings.resize_s), (0.0, 0.0, 0.0));
    }
}
