//! Reading what a store lacks of a set, to fill it ahead of time.

use std::collections::VecDeque;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{RunFeatures, view_pixels};
use crate::image::{Augment, Filter, decode};
use crate::loader::sample::{Quarantined, guarded, quarantine};
use crate::loader::workers::{Queue, Workers};
use crate::text::caption::Pick;
use crate::{DataError, SampleError};

/// How images are read.
#[derive(Debug, Clone, Copy)]
pub struct FillOptions {
    /// Images a batch.
    pub batch: usize,
    /// Decoding threads.
    pub threads: usize,
    /// Batches decoded ahead.
    pub prefetch: usize,
    /// Side of the images.
    pub image_size: usize,
    /// How they are brought to it.
    pub filter: Filter,
    /// How the views are varied.
    pub augment: Augment,
}

/// A view of a sample that is not stored yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LackingRow {
    /// Index of the sample.
    pub index: u64,
    /// Number of the view.
    pub view: u64,
    /// Digest of the image file.
    pub image: u64,
}

/// Views to be encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewBatch {
    /// `[B]`; may be empty.
    pub rows: Vec<LackingRow>,
    /// `[B, 3, S, S]`
    pub pixels: Vec<u8>,
    /// Rows of the set that were looked at, these among them.
    pub done: u64,
}

/// A row with its pixels where it is lacking.
type Looked = Result<Option<(LackingRow, Vec<u8>)>, (u64, SampleError)>;

/// The rows that a store may hold and does not, view after view, in the set's order. An image that cannot be read is left out.
pub struct FillReader {
    workers: Workers,
    features: Arc<RunFeatures>,
    options: FillOptions,
    pending: Queue<Looked>,
    ahead: u64,
    quarantined: Vec<Quarantined>,
}

impl FillReader {
    /// Starts to read.
    ///
    /// # Errors
    /// When an option that must be positive is zero, the shard cache cannot hold what is read at once, or threads cannot be
    /// started.
    pub fn new(features: Arc<RunFeatures>, options: FillOptions) -> Result<FillReader, DataError> {
        let FillOptions { batch, threads, prefetch, image_size, .. } = options;
        for (option, value) in
            [("batch", batch), ("threads", threads), ("prefetch", prefetch), ("image_size", image_size)]
        {
            if value == 0 {
                return Err(DataError::Option { option, expected: "at least 1".to_owned(), got: "0".to_owned() });
            }
        }
        features.corpus().check_cache(1, "a shard that is read in its order")?;
        let workers = Workers::new(threads)?;
        let mut reader =
            FillReader { workers, features, options, pending: VecDeque::new(), ahead: 0, quarantined: Vec::new() };
        reader.decode_ahead();
        Ok(reader)
    }

    /// The samples that were left out since the last call; one that cannot be read is named once a view.
    pub fn take_quarantined(&mut self) -> Vec<Quarantined> {
        std::mem::take(&mut self.quarantined)
    }

    /// Rows that are being looked at.
    fn pending_rows(&self) -> u64 {
        (self.pending.len() * self.options.batch) as u64
    }

    fn decode_ahead(&mut self) {
        let all = self.features.stored_rows();
        let reach = (self.options.prefetch * self.options.batch) as u64;
        let (oldest, _) = self.features.ranked(self.ahead.saturating_sub(self.pending_rows()));
        self.features.corpus().prefetch_samples(oldest..oldest.saturating_add(reach));
        while self.pending.len() < self.options.prefetch && self.ahead < all {
            let first = self.ahead;
            let count = (all - first).min(self.options.batch as u64);
            let (features, options) = (Arc::clone(&self.features), self.options);
            let look = move |at: usize| {
                let (index, view) = features.ranked(first + at as u64);
                guarded(|| look(&features, &options, index, view)).map_err(|error| (index, error))
            };
            self.ahead += count;
            self.pending.push_back((self.ahead, self.workers.start(count as usize, look)));
        }
    }
}

/// Reads an image; decodes it where its row is lacking.
fn look(
    features: &RunFeatures,
    options: &FillOptions,
    index: u64,
    view: u64,
) -> Result<Option<(LackingRow, Vec<u8>)>, SampleError> {
    let raw = features.corpus().read(index, Pick::First)?;
    let image = xxh3_64(&raw.image);
    if features.holds(index, view, image) {
        return Ok(None);
    }
    let FillOptions { image_size, filter, augment, .. } = *options;
    let pixels = view_pixels(&decode(&raw.image)?, image_size, filter, augment, image, view);
    Ok(Some((LackingRow { index, view, image }, pixels)))
}

impl Drop for FillReader {
    /// Others may have the shard cache's room then.
    fn drop(&mut self) {
        self.features.corpus().let_go();
    }
}

impl Iterator for FillReader {
    type Item = Result<ViewBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (done, pending) = self.pending.pop_front()?;
        let Some(looked) = pending.wait() else {
            return Some(Err(DataError::LostThread { position: done }));
        };
        self.decode_ahead();
        let mut batch = ViewBatch { rows: Vec::new(), pixels: Vec::new(), done };
        for result in looked {
            match result {
                Ok(None) => {}
                Ok(Some((row, pixels))) => {
                    batch.rows.push(row);
                    batch.pixels.extend(pixels);
                }
                Err((_, SampleError::Machine(error))) => {
                    self.pending.clear();
                    self.ahead = self.features.stored_rows();
                    return Some(Err(*error));
                }
                Err((index, error)) => self.quarantined.push(quarantine(self.features.corpus(), index, &error)),
            }
        }
        Some(Ok(batch))
    }
}
