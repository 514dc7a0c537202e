//! A store as one run uses it: which rows its steps and evaluations count on, and which it may add.
//!
//! Kernels may give other bits for another batch, so what is encoded together must not depend on when a process was killed. A row was
//! *there before* a step or an evaluation when another run wrote it, or this run in an earlier one. The rows of a batch that were not there
//! before are encoded together, whatever a killed process of this run has already stored of them.

use std::num::NonZero;
use std::sync::Arc;

use super::shard_file::RECORD_BYTES;
use super::{FeatureStore, RowPlace, StoredRow};
use crate::{Corpus, DataError};

/// Who writes rows. The number names a run, and is equal when the run is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// No run: what fills a store ahead of time, or measures a model once.
    NoRun,
    /// The steps of a run.
    Steps(u64),
    /// Its evaluations.
    Evaluations(u64),
}

impl Writer {
    /// What its rows bear.
    pub const fn id(self) -> u64 {
        match self {
            Writer::NoRun => 0,
            // One bit tells the two apart, another one both from no run.
            Writer::Steps(run) => (run | 2) & !1,
            Writer::Evaluations(run) => run | 3,
        }
    }
}

/// How a run uses a store.
#[derive(Debug, Clone, Copy)]
pub struct RunFeaturesOptions {
    /// Views of an image that are read in turn.
    pub views: NonZero<u64>,
    /// Who writes.
    pub writer: Writer,
    /// Samples a step, of all ranks.
    pub global_batch: NonZero<u64>,
    /// Bytes that rows may take; `None`: all of them.
    pub max_bytes: Option<u64>,
    /// Rows of another set that have their place in these bytes first.
    pub rows_before: u64,
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
    /// Stream position of the step that needs it, or at which the evaluation is made.
    pub position: u64,
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

    /// What the rows bear that are written here.
    pub fn writer(&self) -> u64 {
        self.options.writer.id()
    }

    /// Images of the set.
    pub fn pictures(&self) -> u64 {
        self.corpus.len()
    }

    /// Views of an image.
    pub fn views(&self) -> u64 {
        self.options.views.get()
    }

    /// Rows of the whole set: every view of every sample.
    pub fn rows(&self) -> u64 {
        self.corpus.len().saturating_mul(self.views())
    }

    /// How many of them may be stored.
    pub fn stored_rows(&self) -> u64 {
        let most = self
            .options
            .max_bytes
            .map_or(u64::MAX, |bytes| (bytes / self.row_bytes()).saturating_sub(self.options.rows_before));
        self.rows().min(most)
    }

    /// Bytes that a row takes, with its record.
    pub fn row_bytes(&self) -> u64 {
        self.store.row_bytes() as u64 + RECORD_BYTES
    }

    /// Whether the row of a sample may be stored. A function of the set and the limit alone, so that it is the same whenever it is asked:
    /// the first view of all samples goes before the second.
    pub fn may_store(&self, index: u64, view: u64) -> bool {
        view < self.stored_views(index)
    }

    /// How many views of a sample may be stored.
    pub(super) fn stored_views(&self, index: u64) -> u64 {
        let (rows, samples) = (self.stored_rows(), self.corpus.len().max(1));
        rows / samples + u64::from(index < rows % samples)
    }

    /// How many rows of the samples in front of `end` may be stored.
    pub(super) fn stored_before(&self, end: u64) -> u64 {
        let (rows, samples) = (self.stored_rows(), self.corpus.len().max(1));
        rows / samples * end + end.min(rows % samples)
    }

    /// Whether a row was there before the step that trains on stream position `position`, or the evaluation at it.
    pub fn was_there(&self, row: &StoredRow, position: u64) -> bool {
        let now = self.moment(self.writer(), position);
        self.moment(row.writer, row.position).is_none_or(|then| Some(then) < now)
    }

    /// When this run wrote a row: the first position of the step, in front of which there may be an evaluation. `None` of other writers.
    fn moment(&self, writer: u64, position: u64) -> Option<(u64, bool)> {
        let (Writer::Steps(run) | Writer::Evaluations(run)) = self.options.writer else { return None };
        let step = position - position % self.options.global_batch;
        let of_a_step = writer == Writer::Steps(run).id();
        (of_a_step || writer == Writer::Evaluations(run).id()).then_some((step, of_a_step))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feature_store::description;
    use crate::fixture::{corpus, shards};

    #[test]
    fn a_row_counts_where_it_was_written_before() {
        let (folder, cache) = (shards(&[2], |_| false), tempfile::tempdir().unwrap());
        let of = |writer| {
            let store = FeatureStore::open(cache.path(), &description::example()).unwrap();
            let (views, global_batch) = (NonZero::<u64>::MIN, NonZero::new(8).unwrap());
            let options = RunFeaturesOptions { views, writer, global_batch, max_bytes: None, rows_before: 0 };
            RunFeatures::new(store, corpus(folder.path()), options)
        };
        let row = |writer: Writer, position| StoredRow { image: 1, writer: writer.id(), position, payload: Vec::new() };
        let (steps, evaluations) = (Writer::Steps(4), Writer::Evaluations(4));
        // The evaluation at 16 comes behind the step of 8 to 15 and in front of that of 16 to 23.
        let (step, evaluation, other) = (of(steps), of(evaluations), of(Writer::NoRun));
        for (writer, position, before_step, before_evaluation) in [
            (steps, 15, true, true),
            (evaluations, 8, true, true),
            (evaluations, 16, true, false),
            (steps, 16, false, false),
            (steps, 20, false, false),
            (evaluations, 24, false, false),
            (Writer::Steps(8), 99, true, true),
            (Writer::Evaluations(8), 99, true, true),
            (Writer::NoRun, 99, true, true),
        ] {
            let row = row(writer, position);
            let found = [step.was_there(&row, 21), evaluation.was_there(&row, 16), other.was_there(&row, 0)];
            assert_eq!(found, [before_step, before_evaluation, true], "{writer:?} at {position}");
        }
    }
}
