//! The order law: which sample stands at a position of the training stream, as a function of the seed alone.
//!
//! A stream position `p` is slot `i = p mod G` of global batch `b = p div G`. Slot `i` belongs to lane
//! `l = floor(i L / G)` and is that lane's position `q = b G/L + (i mod G/L)`. Epoch `e` of `N` samples is the
//! concatenation of its shards in a keyed order; lane `l` owns the `l`-th of `L` contiguous ranges. Lane `l` has drawn
//! `floor((e N + L - 1 - l) / L)` samples before epoch `e`, so ranges differ by at most one sample, the longer ones
//! rotate with the epoch, and `q` lies in epoch `floor((q L + l) / N)`. Inside a lane's range, `window_shards`
//! consecutive shards are a window, whose samples a keyed permutation orders.
//!
//! Threads, ranks and restarts appear nowhere in this.

pub(crate) mod interleave;
pub(crate) mod lanes;
pub(crate) mod mixture;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use crate::keyed::{Permutation, key};
use crate::order::lanes::Lanes;

/// Why an order cannot be made.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum OrderError {
    /// There is nothing to order.
    #[error("the shards hold no usable sample")]
    NoSamples,
    /// A parameter that must be positive is zero.
    #[error("{0} must be at least 1, got 0")]
    Zero(&'static str),
    /// The lanes do not divide the batch.
    #[error("lanes must divide the global batch: {global_batch} is not a multiple of {lanes}")]
    Lanes {
        /// Number of lanes.
        lanes: usize,
        /// Samples a global batch.
        global_batch: usize,
    },
    /// The weights of a mixture.
    #[error("weights of the data sets {weights:?}: {reason}")]
    Weights {
        /// As they were given.
        weights: Vec<f64>,
        /// What is wrong with them.
        reason: String,
    },
}

/// What stands at a stream position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Located {
    /// How many times the lane has been through the data set before.
    pub epoch: u64,
    /// The sample's index in the data set.
    pub index: u64,
    /// The lane that the position belongs to.
    pub lane: u32,
}

/// The order of one data set's samples in the endless training stream.
#[derive(Debug)]
pub struct Order {
    counts: Vec<u64>,
    /// Data set index of each shard's first sample.
    starts: Vec<u64>,
    samples: u64,
    seed: u64,
    lanes: Lanes,
    window_shards: usize,
    /// The shard orders of the epochs in use: lanes may stand in different ones around a seam.
    epochs: Mutex<VecDeque<Arc<Epoch>>>,
    /// The windows that each lane was asked for last: nearly every position lies in the window of the one before.
    recent: Vec<Mutex<[Option<Arc<Window>>; 2]>>,
}

/// The shards of one epoch in their order.
#[derive(Debug)]
struct Epoch {
    number: u64,
    /// Shards that hold samples.
    shards: Vec<usize>,
    /// `ends[j]`: samples in `shards[..=j]`.
    ends: Vec<u64>,
}

/// A stretch of a lane's positions, and the samples that stand there.
#[derive(Debug)]
struct Window {
    epoch: u64,
    lane: u64,
    /// The lane's position at which it begins.
    start: u64,
    /// Its samples.
    len: u64,
    permutation: Permutation,
    /// In the epoch's order.
    parts: Vec<Part>,
}

/// The samples that a window takes from one shard.
#[derive(Debug)]
struct Part {
    shard: usize,
    /// The window's samples up to here.
    end: u64,
    /// Data set index of the first of them.
    first: u64,
}

const KEEP_EPOCHS: usize = 4;
const SHARDS: u64 = 1;
const WINDOW: u64 = 2;

impl Order {
    /// The order of shards with `counts` samples each.
    ///
    /// # Errors
    /// When there is no sample, a parameter is zero, or `lanes` does not divide `global_batch`.
    pub fn new(
        counts: &[u64],
        seed: u64,
        lanes: usize,
        global_batch: usize,
        window_shards: usize,
    ) -> Result<Order, OrderError> {
        let recent = (0..lanes).map(|_| Mutex::default()).collect();
        let lanes = Lanes::new(lanes, global_batch)?;
        if window_shards == 0 {
            return Err(OrderError::Zero("window_shards"));
        }
        let mut samples = 0;
        let starts = counts
            .iter()
            .map(|count| {
                samples += count;
                samples - count
            })
            .collect();
        if samples == 0 {
            return Err(OrderError::NoSamples);
        }
        Ok(Order {
            counts: counts.to_vec(),
            starts,
            samples,
            seed,
            lanes,
            window_shards,
            epochs: Mutex::new(VecDeque::new()),
            recent,
        })
    }

    /// Samples in one epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The sample at stream position `position`.
    pub fn locate(&self, position: u64) -> Located {
        let (window, offset) = self.place(position);
        Located { epoch: window.epoch, index: window.index_at(offset), lane: window.lane as u32 }
    }

    /// The other samples of the position's window, in the order in which they replace one that cannot be read: those
    /// that the law puts behind it, then those before it.
    pub fn window(&self, position: u64) -> impl Iterator<Item = u64> + '_ {
        let (window, offset) = self.place(position);
        (1..window.len).map(move |step| window.index_at((offset + step) % window.len))
    }

    /// The lanes to which slots of a global batch belong.
    pub fn lanes_of(&self, slots: &Range<u64>) -> Range<u64> {
        self.lanes.of(slots)
    }

    /// The shards of the windows from which `batches` global batches draw these slots, from the batch at `position`
    /// on, and of the window behind in each lane; in the order in which they are needed.
    pub fn shards_ahead(&self, position: u64, batches: usize, slots: &Range<u64>) -> Vec<usize> {
        let Range { start: first, end } = self.lanes.ahead(position, batches);
        let mut rounds: Vec<Vec<Arc<Window>>> = Vec::new();
        for lane in self.lanes_of(slots) {
            let (mut at, mut round) = (first, 0);
            loop {
                let window = self.lane_window(lane, at);
                let (is_behind, next) = (window.start >= end, window.start.checked_add(window.len));
                if round == rounds.len() {
                    rounds.push(Vec::new());
                }
                rounds[round].push(window);
                match next {
                    Some(next) if !is_behind => (at, round) = (next, round + 1),
                    _ => break,
                }
            }
        }
        let mut seen = HashSet::new();
        let parts = rounds.iter().flatten().flat_map(|window| &window.parts);
        parts.map(|part| part.shard).filter(|shard| seen.insert(*shard)).collect()
    }

    /// The window of a stream position, and the position's place in its order.
    fn place(&self, position: u64) -> (Arc<Window>, u64) {
        let (lane, lane_position) = self.lanes.place(position);
        let window = self.lane_window(lane, lane_position);
        let offset = lane_position - window.start;
        (window, offset)
    }

    fn lane_window(&self, lane: u64, lane_position: u64) -> Arc<Window> {
        let holds =
            |window: &Arc<Window>| lane_position.checked_sub(window.start).is_some_and(|offset| offset < window.len);
        // A poisoned lock holds whole windows all the same: they are put in ready-made.
        let mut recent = self.recent[lane as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = recent.iter().flatten().find(|window| holds(window)) {
            return Arc::clone(window);
        }
        let window = Arc::new(self.make_window(lane, lane_position));
        recent.swap(0, 1);
        recent[0] = Some(Arc::clone(&window));
        window
    }

    fn make_window(&self, lane: u64, lane_position: u64) -> Window {
        let drawn = u128::from(lane_position) * u128::from(self.lanes.count) + u128::from(lane);
        let epoch = self.epoch((drawn / u128::from(self.samples)) as u64);
        let range = self.lane_range(epoch.number, lane);
        let drawn_before = self.drawn_before(epoch.number, lane);
        let at = range.start + (lane_position - drawn_before);

        let first = epoch.shard_at(range.start);
        let number = (epoch.shard_at(at) - first) / self.window_shards;
        let shard = first + number * self.window_shards;
        let last = shard.saturating_add(self.window_shards - 1).min(epoch.shards.len() - 1);
        let span = epoch.start(shard).max(range.start)..epoch.ends[last].min(range.end);
        let len = span.end - span.start;
        let parts = (shard..=last)
            .take_while(|&place| epoch.start(place) < span.end)
            .map(|place| {
                let (begin, shard) = (epoch.start(place), epoch.shards[place]);
                let skipped = span.start.saturating_sub(begin);
                Part { shard, end: epoch.ends[place].min(span.end) - span.start, first: self.starts[shard] + skipped }
            })
            .collect();
        let key = key(self.seed, &[WINDOW, epoch.number, lane, number as u64]);
        let (permutation, start) = (Permutation::new(len, key), drawn_before + (span.start - range.start));
        Window { epoch: epoch.number, lane, start, len, permutation, parts }
    }

    /// How many samples `lane` has drawn before `epoch`.
    fn drawn_before(&self, epoch: u64, lane: u64) -> u64 {
        let total = u128::from(epoch) * u128::from(self.samples);
        ((total + u128::from(self.lanes.count - 1 - lane)) / u128::from(self.lanes.count)) as u64
    }

    /// The part of the epoch's concatenated shards that `lane` reads.
    fn lane_range(&self, epoch: u64, lane: u64) -> Range<u64> {
        let (base, longer) = (self.samples / self.lanes.count, self.samples % self.lanes.count);
        // The longer ranges are those of `longer` lanes in a circle from `turn` on.
        let turn = (u128::from(epoch) * u128::from(longer) % u128::from(self.lanes.count)) as u64;
        let wrapped = (turn + longer).saturating_sub(self.lanes.count);
        let longer_before = |lane: u64| lane.min(wrapped) + lane.saturating_sub(turn).min(longer - wrapped);
        let start = |lane: u64| lane * base + longer_before(lane);
        start(lane)..start(lane + 1)
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        // A poisoned lock holds whole entries all the same: they are pushed ready-made.
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = epochs.iter().find(|epoch| epoch.number == number) {
            return Arc::clone(epoch);
        }
        let permutation = Permutation::new(self.counts.len() as u64, key(self.seed, &[SHARDS, number]));
        let shards: Vec<usize> = (0..self.counts.len() as u64)
            .map(|place| permutation.apply(place) as usize)
            .filter(|&shard| self.counts[shard] > 0)
            .collect();
        let mut end = 0;
        let ends = shards
            .iter()
            .map(|&shard| {
                end += self.counts[shard];
                end
            })
            .collect();
        let epoch = Arc::new(Epoch { number, shards, ends });
        if epochs.len() == KEEP_EPOCHS {
            epochs.pop_front();
        }
        epochs.push_back(Arc::clone(&epoch));
        epoch
    }
}

impl Window {
    /// Data set index of what stands at a place of the window's order.
    fn index_at(&self, offset: u64) -> u64 {
        let at = self.permutation.apply(offset);
        let place = self.parts.partition_point(|part| part.end <= at);
        let begin = place.checked_sub(1).map_or(0, |before| self.parts[before].end);
        self.parts[place].first + (at - begin)
    }
}

impl Epoch {
    /// Which shard, counted along the epoch, holds sample `at`.
    fn shard_at(&self, at: u64) -> usize {
        self.ends.partition_point(|&end| end <= at)
    }

    /// Samples in front of a shard.
    fn start(&self, shard: usize) -> u64 {
        shard.checked_sub(1).map_or(0, |before| self.ends[before])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_a_seed_never_changes() {
        let order = Order::new(&[5, 0, 4, 3], 42, 2, 4, 2).unwrap();
        let found: Vec<u64> = (0..24).map(|p| order.locate(p).index).collect();
        // Two epochs; each batch of four takes two from either lane.
        let expected = [7, 0, 9, 2, 6, 5, 3, 10, 8, 1, 4, 11, 2, 0, 11, 8, 4, 1, 7, 5, 3, 9, 6, 10];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_lane_with_no_sample_in_an_epoch_goes_on_to_the_next() {
        // Two samples, four lanes: each epoch serves two of them.
        let order = Order::new(&[2], 1, 4, 4, 1).unwrap();
        let batch: Vec<Located> = (0..4).map(|p| order.locate(p)).collect();
        assert_eq!(batch.iter().map(|l| l.epoch).collect::<Vec<_>>(), [0, 0, 1, 1]);
        assert_eq!(batch[0].index + batch[1].index, 1);
        assert_eq!(batch[2].index + batch[3].index, 1);
    }

    #[test]
    fn the_far_end_of_the_stream_does_not_overflow() {
        let order = Order::new(&[3, 9], 1, 3, 6, 8).unwrap();
        assert!(order.locate(u64::MAX).index < 12);
        assert_eq!(order.window(u64::MAX).count() as u64 + 1, 4);
    }

    #[test]
    fn contradictions_are_refused() {
        let refused = |counts: &[u64], lanes, batch, window| Order::new(counts, 0, lanes, batch, window).unwrap_err();
        assert_eq!(refused(&[0, 0], 1, 1, 1), OrderError::NoSamples);
        assert_eq!(refused(&[1], 0, 1, 1), OrderError::Zero("lanes"));
        assert_eq!(refused(&[1], 1, 1, 0), OrderError::Zero("window_shards"));
        assert_eq!(refused(&[1], 3, 8, 1), OrderError::Lanes { lanes: 3, global_batch: 8 });
    }
}
