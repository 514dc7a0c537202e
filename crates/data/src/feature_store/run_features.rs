//! A store as one run uses it: which rows its steps count on, and which it may add.
//!
//! Kernels may give other bits for another batch, so what is encoded together must not depend on when a process was killed. A row was
//! *there before* a step when another run wrote it, or this run in an earlier global batch. The rows of a micro-batch that were not there
//! before are encoded together, whatever a killed process of this run has already stored of them.

use std::num::NonZero;
use std::sync::Arc;

use super::shard_file::RECORD_BYTES;
use super::{FeatureStore, RowPlace, StoredRow};
use crate::{Corpus, DataError};

/// How a run uses a store.
#[derive(Debug, Clone, Copy)]
pub struct RunFeaturesOptions {
    /// Views of an image that the epochs take in turn.
    pub views: NonZero<u64>,
    /// Names the run: equal when it is resumed.
    pub writer: u64,
    /// Samples a step, of all ranks.
    pub global_batch: NonZero<u64>,
    /// Bytes that the rows of this set may take; `None`: all of them.
    pub max_bytes: Option<u64>,
}

/// A store with the data set whose rows are read and written.
pub struct RunFeatures {
    store: FeatureStore,
    corpus: Arc<Corpus>,
    options: RunFeaturesOptions,
}

/// What a sample's features are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureRow {
    /// Number of the view.
    pub view: u64,
    /// The row, where it was stored when the sample was read ahead.
    pub stored: Option<Arc<StoredRow>>,
}

impl RunFeatures {
    /// The rows of `corpus` in `store`.
    pub fn new(store: FeatureStore, corpus: Arc<Corpus>, options: RunFeaturesOptions) -> RunFeatures {
        RunFeatures { store, corpus, options }
    }

    /// The store.
    pub fn store(&self) -> &FeatureStore {
        &self.store
    }

    /// Names the run.
    pub fn writer(&self) -> u64 {
        self.options.writer
    }

    /// Rows of the whole set: every view of every sample.
    pub fn rows(&self) -> u64 {
        self.corpus.len().saturating_mul(self.options.views.get())
    }

    /// How many of them may be stored.
    pub fn stored_rows(&self) -> u64 {
        let most = self.options.max_bytes.map_or(u64::MAX, |bytes| bytes / self.row_bytes());
        self.rows().min(most)
    }

    /// Bytes that a row takes, with its record.
    pub fn row_bytes(&self) -> u64 {
        self.store.row_bytes() as u64 + RECORD_BYTES
    }

    /// Whether the row of a sample may be stored. A function of the set and the limit alone, so that it is the same whenever it is asked:
    /// the first view of all samples goes before the second.
    pub fn may_store(&self, index: u64, view: u64) -> bool {
        self.rank(index, view) < self.stored_rows()
    }

    /// The place of a row in the order in which the limit lets rows in.
    fn rank(&self, index: u64, view: u64) -> u64 {
        view.saturating_mul(self.corpus.len()).saturating_add(index)
    }

    /// Sample and view by the place in that order.
    pub(super) fn ranked(&self, rank: u64) -> (u64, u64) {
        (rank % self.corpus.len(), rank / self.corpus.len())
    }

    /// Whether a row was there before the step that trains on stream position `position`.
    pub fn was_there(&self, row: &StoredRow, position: u64) -> bool {
        row.writer != self.options.writer || row.position < position - position % self.options.global_batch
    }

    /// The row of a view of sample `index`, where it is whole and made from the image with this digest.
    pub fn read(&self, index: u64, view: u64, image: u64) -> Option<StoredRow> {
        self.store.read(self.place(index, view)?, image)
    }

    /// Whether such a row has been written; the payload is not looked at.
    pub fn holds(&self, index: u64, view: u64, image: u64) -> bool {
        self.place(index, view).is_some_and(|place| self.store.holds(place, image))
    }

    /// Stores the row of a view of sample `index`.
    ///
    /// # Errors
    /// When there is no such sample or the disk refuses.
    pub fn write(&self, index: u64, view: u64, row: &StoredRow) -> Result<(), DataError> {
        let place = self.place(index, view).ok_or(DataError::OutOfRange { index, len: self.corpus.len() })?;
        self.store.write(place, row)
    }

    pub(super) fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    fn place(&self, index: u64, view: u64) -> Option<RowPlace<'_>> {
        let (shard, ordinal) = self.corpus.place(index)?;
        Some(RowPlace { shard, ordinal, view })
    }
}

impl std::fmt::Debug for RunFeatures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunFeatures")
            .field("store", &self.store)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
