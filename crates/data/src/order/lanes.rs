//! Which lane a stream position belongs to, and where in the lane it stands.
//!
//! Slot `i` of a global batch of `G` belongs to lane `l = floor(i L / G)` of `L`; batch `b` gives each lane `G/L` positions,
//! from `b G/L` on.

use std::ops::Range;

use crate::order::OrderError;

/// The lanes of a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lanes {
    /// L.
    pub(crate) count: u64,
    /// G, a multiple of L.
    global_batch: u64,
}

impl Lanes {
    /// `count` lanes of batches of `global_batch`.
    ///
    /// # Errors
    /// When one of them is zero, or the lanes do not divide the batch.
    pub(crate) fn new(count: usize, global_batch: usize) -> Result<Lanes, OrderError> {
        for (name, value) in [("lanes", count), ("global_batch", global_batch)] {
            if value == 0 {
                return Err(OrderError::Zero(name));
            }
        }
        if !global_batch.is_multiple_of(count) {
            return Err(OrderError::Lanes { lanes: count, global_batch });
        }
        Ok(Lanes { count: count as u64, global_batch: global_batch as u64 })
    }

    /// Positions that a global batch gives each lane, `G/L`.
    fn batch(self) -> u64 {
        self.global_batch / self.count
    }

    /// The lane of a stream position, and the lane's own position.
    pub(crate) fn place(self, position: u64) -> (u64, u64) {
        let slot = position % self.global_batch;
        (slot / self.batch(), self.begun(position) + slot % self.batch())
    }

    /// The position of every lane at which the global batch at `position` begins.
    pub(crate) fn begun(self, position: u64) -> u64 {
        position / self.global_batch * self.batch()
    }

    /// The positions of every lane that `batches` global batches draw, from the batch at `position` on.
    pub(crate) fn ahead(self, position: u64, batches: usize) -> Range<u64> {
        let first = self.begun(position);
        first..first.saturating_add(batches as u64 * self.batch())
    }

    /// The lanes to which slots of a global batch belong.
    pub(crate) fn of(self, slots: &Range<u64>) -> Range<u64> {
        slots.start / self.batch()..slots.end.div_ceil(self.batch()).min(self.count)
    }
}
