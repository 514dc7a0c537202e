//! Reading what a store lacks of a set, to fill it ahead of time: every picture once, for all of its views.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{RunFeatures, view_frame};
use crate::image::{Augment, Filter, JpegSize, Picture};
use crate::loader::sample::{Quarantined, guarded, quarantine};
use crate::loader::workers::{Queue, Workers};
use crate::text::caption::Pick;
use crate::{DataError, SampleError};

/// How images are read.
#[derive(Debug, Clone, Copy)]
pub struct FillOptions {
    /// Views a batch; at least those of one image are in it.
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
    /// The size at which JPEGs are decoded.
    pub jpegs: JpegSize,
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
    /// Rows of the same images that are stored.
    pub there: u64,
    /// Rows of the set that were looked at, these among them.
    pub done: u64,
}

/// The lacking views of an image with their pixels.
struct Looked {
    lacking: Vec<(LackingRow, Vec<u8>)>,
    there: u64,
}

/// The rows that a store may hold and does not, in the set's order, all views of an image side by side. An image that cannot be read is left
/// out.
pub struct FillReader {
    workers: Workers,
    features: Arc<RunFeatures>,
    options: FillOptions,
    pending: Queue<Result<Looked, (u64, SampleError)>>,
    /// The next sample to be looked at.
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

    /// The samples that were left out since the last call.
    pub fn take_quarantined(&mut self) -> Vec<Quarantined> {
        std::mem::take(&mut self.quarantined)
    }

    /// Images a batch.
    fn images(&self) -> u64 {
        (self.options.batch as u64 / self.features.views()).max(1)
    }

    fn decode_ahead(&mut self) {
        // The limit may leave the last ones without a row.
        let end = self.features.corpus().len().min(self.features.stored_rows());
        let images = self.images();
        let oldest = self.ahead.saturating_sub(self.pending.len() as u64 * images);
        let reach = (self.options.prefetch * self.options.batch) as u64;
        self.features.corpus().prefetch_samples(oldest..oldest.saturating_add(reach));
        while self.pending.len() < self.options.prefetch && self.ahead < end {
            let first = self.ahead;
            let count = (end - first).min(images);
            let (features, options) = (Arc::clone(&self.features), self.options);
            let look = move |at: usize| {
                let index = first + at as u64;
                guarded(|| look(&features, &options, index)).map_err(|error| (index, error))
            };
            self.ahead += count;
            self.pending.push_back((self.ahead, self.workers.start(count as usize, look)));
        }
    }
}

/// Reads an image; decodes it where one of its views is lacking, once for all that want it at the same scale.
fn look(features: &RunFeatures, options: &FillOptions, index: u64) -> Result<Looked, SampleError> {
    let raw = features.corpus().read(index, Pick::First)?;
    let image = xxh3_64(&raw.image);
    let views = features.stored_views(index);
    let lacking: Vec<u64> = (0..views).filter(|&view| !features.holds(index, view, image)).collect();
    let there = views - lacking.len() as u64;
    if lacking.is_empty() {
        return Ok(Looked { lacking: Vec::new(), there });
    }
    let FillOptions { image_size: size, filter, augment, jpegs, .. } = *options;
    let mut picture = Picture::open(&raw.image, jpegs)?;
    let mut decoded = BTreeMap::new();
    let mut made = Vec::with_capacity(lacking.len());
    for view in lacking {
        let frame = view_frame(picture.width, picture.height, augment, image, view);
        let wanted = picture.scale(&frame, size);
        let scale = match decoded.contains_key(&wanted) {
            true => wanted,
            false => {
                let (pixels, scale) = picture.decode(wanted)?;
                decoded.insert(scale, pixels);
                scale
            }
        };
        made.push((LackingRow { index, view, image }, frame.pixels(&decoded[&scale], scale, size, filter)));
    }
    Ok(Looked { lacking: made, there })
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
        let (end, pending) = self.pending.pop_front()?;
        let done = self.features.stored_before(end);
        let Some(looked) = pending.wait() else {
            return Some(Err(DataError::LostThread { position: end }));
        };
        self.decode_ahead();
        let mut batch = ViewBatch { rows: Vec::new(), pixels: Vec::new(), there: 0, done };
        for result in looked {
            match result {
                Ok(Looked { lacking, there }) => {
                    batch.there += there;
                    for (row, pixels) in lacking {
                        batch.rows.push(row);
                        batch.pixels.extend(pixels);
                    }
                }
                Err((_, SampleError::Machine(error))) => {
                    self.pending.clear();
                    self.ahead = self.features.corpus().len();
                    return Some(Err(*error));
                }
                Err((index, error)) => self.quarantined.push(quarantine(self.features.corpus(), index, &error)),
            }
        }
        Some(Ok(batch))
    }
}
