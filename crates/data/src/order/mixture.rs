//! The order law of a training set that is made of several data sets: which sample stands at a stream position.
//!
//! A position belongs to a lane as in [`crate::Order`]. [`Interleave`] says which data set the lane draws there and how
//! many draws that set has had in the lane; the set is a stream of its own, with its own epochs.

use std::ops::Range;

use crate::keyed::key;
use crate::order::interleave::Interleave;
use crate::order::lanes::Lanes;
use crate::order::{Located, Order, OrderError};

/// A data set as the order law sees it.
#[derive(Debug, Clone)]
pub struct MixtureSet {
    /// Samples in each of its shards.
    pub counts: Vec<u64>,
    /// How often it is drawn from, relative to the others.
    pub weight: f64,
}

/// The order of a training set's samples in the endless stream. A sample's index counts through all sets.
#[derive(Debug)]
pub struct Mixture {
    interleave: Interleave,
    /// Each set's own order, with one draw a lane in its batches.
    orders: Vec<Order>,
    /// Index of each set's first sample.
    starts: Vec<u64>,
    lanes: Lanes,
}

/// How far a data set has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    /// Samples drawn from it.
    pub samples: u64,
    /// Samples it holds.
    pub len: u64,
}

impl Drawn {
    /// How often the set has been gone through.
    pub fn epochs(self) -> f64 {
        self.samples as f64 / self.len as f64
    }
}

/// Sets the streams of a mixture's data sets apart.
const SET: u64 = 4;

impl Mixture {
    /// The order of these data sets.
    ///
    /// # Errors
    /// When a set has no sample, weights or parameters are out of range, or `lanes` does not divide `global_batch`.
    pub fn new(
        sets: &[MixtureSet],
        seed: u64,
        lanes: usize,
        global_batch: usize,
        window_shards: usize,
    ) -> Result<Mixture, OrderError> {
        let lane_count = lanes;
        let lanes = Lanes::new(lanes, global_batch)?;
        let weights: Vec<f64> = sets.iter().map(|set| set.weight).collect();
        let interleave = Interleave::new(&weights)?;
        let (mut orders, mut starts, mut start) = (Vec::new(), Vec::new(), 0);
        for (number, set) in sets.iter().enumerate() {
            // A set that stands alone keeps the order that its seed always had.
            let seed = if number == 0 { seed } else { key(seed, &[SET, number as u64]) };
            let order = Order::new(&set.counts, seed, lane_count, lane_count, window_shards)?;
            starts.push(start);
            start += order.samples();
            orders.push(order);
        }
        Ok(Mixture { interleave, orders, starts, lanes })
    }

    /// The sample at stream position `position`. The epoch is that of its data set.
    pub fn locate(&self, position: u64) -> Located {
        let (set, own) = self.draw(position);
        let Located { epoch, index, lane } = self.orders[set].locate(own);
        Located { epoch, index: self.starts[set] + index, lane }
    }

    /// The other samples of the position's window, in the order in which they replace one that cannot be read.
    pub fn window(&self, position: u64) -> impl Iterator<Item = u64> + '_ {
        let (set, own) = self.draw(position);
        self.orders[set].window(own).map(move |index| self.starts[set] + index)
    }

    /// How far each set has been read when the stream is at the beginning of a global batch.
    pub fn drawn(&self, position: u64) -> Vec<Drawn> {
        let begun = self.lanes.begun(position);
        let drawn = |set: usize| self.interleave.drawn(set, begun) * self.lanes.count;
        self.orders.iter().enumerate().map(|(set, o)| Drawn { samples: drawn(set), len: o.samples() }).collect()
    }

    /// The lanes to which slots of a global batch belong.
    pub fn lanes_of(&self, slots: &Range<u64>) -> Range<u64> {
        self.lanes.of(slots)
    }

    /// For each set the shards of the windows from which `batches` global batches draw these slots, from the batch at
    /// `position` on, and of the window behind in each lane; in the order in which they are needed.
    pub fn shards_ahead(&self, position: u64, batches: usize, slots: &Range<u64>) -> Vec<Vec<usize>> {
        let Range { start, end } = self.lanes.ahead(position, batches);
        let lanes = self.lanes_of(slots);
        let ahead = |(set, order): (usize, &Order)| {
            // A batch of the set's own order is one draw of each lane.
            let (first, end) = (self.interleave.drawn(set, start), self.interleave.drawn(set, end));
            order.shards_ahead(first * self.lanes.count, (end - first) as usize, &lanes)
        };
        self.orders.iter().enumerate().map(ahead).collect()
    }

    /// The set that is drawn at a stream position, and the position in its own stream.
    fn draw(&self, position: u64) -> (usize, u64) {
        let (lane, lane_position) = self.lanes.place(position);
        let (set, draws) = self.interleave.at(lane_position);
        // Lane positions run below 2^64 / L, so this does not overflow.
        (set, draws * self.lanes.count + lane)
    }
}
