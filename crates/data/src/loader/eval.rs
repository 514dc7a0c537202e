//! Reading a range of samples in their own order, for evaluation and for caching features.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::feature_store::RunFeatures;
use crate::image::{Augment, JpegSize};
use crate::loader::collate::{HostBatch, Padding, collate};
use crate::loader::sample::{Preparer, Quarantined, Sample, View};
use crate::loader::timings::Counters;
use crate::loader::workers::{Queue, Workers};
use crate::text::caption::Pick;
use crate::{Clean, Corpus, DataError, Filter, SampleError, TextEncoder};

/// The stored features of images under the evaluation transform, which are their only view.
#[derive(Debug, Clone)]
pub struct EvalFeatures {
    /// Where they are stored: an image whose features are there is not decoded.
    pub rows: Arc<RunFeatures>,
    /// Stream position at which the run evaluates: those that it has stored from then on, before it was killed, do not count.
    pub position: u64,
}

/// What is read, and how.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Data set indices; what lies beyond the set's end is not read.
    pub range: Range<u64>,
    /// Samples a batch.
    pub batch: usize,
    /// Decoding threads.
    pub threads: usize,
    /// Batches decoded ahead.
    pub prefetch: usize,
    /// Side of the images.
    pub image_size: usize,
    /// How they are brought to it.
    pub filter: Filter,
    /// Whether images are decoded.
    pub pixels: bool,
    /// With a feature store.
    pub features: Option<EvalFeatures>,
    /// How captions are cleaned.
    pub clean: Clean,
    /// Token that pads texts.
    pub pad_id: i64,
    /// Padded lengths are multiples of this.
    pub pad_to_multiple: usize,
    /// Samples that are left out unread, and not reported.
    pub left_out: Arc<HashSet<u64>>,
}

/// Batches of consecutive samples with the evaluation transform. A bad sample is left out, not replaced, so a batch
/// may hold fewer than asked for; one that would be empty does not appear. Where this machine or its shard cache is at
/// fault, that ends the row.
pub struct EvalReader {
    workers: Workers,
    preparer: Arc<Preparer>,
    options: EvalOptions,
    pending: Queue<Result<Option<Sample>, (u64, SampleError)>>,
    ahead: u64,
    quarantined: Vec<Quarantined>,
}

impl EvalReader {
    /// Starts to read.
    ///
    /// # Errors
    /// When an option that must be positive is zero, the shard cache cannot hold what is read at once, or threads cannot be
    /// started.
    pub fn new(corpus: Arc<Corpus>, text: Arc<TextEncoder>, mut options: EvalOptions) -> Result<EvalReader, DataError> {
        for (option, value) in [
            ("batch", options.batch),
            ("threads", options.threads),
            ("prefetch", options.prefetch),
            ("image_size", options.image_size),
            ("pad_to_multiple", options.pad_to_multiple),
        ] {
            if value == 0 {
                return Err(DataError::Option { option, expected: "at least 1".to_owned(), got: "0".to_owned() });
            }
        }
        options.range.end = options.range.end.min(corpus.len());
        corpus.check_cache(1, "a shard that is read in its order")?;
        let preparer = Preparer {
            corpus,
            text,
            clean: options.clean,
            image_size: options.image_size,
            filter: options.filter,
            jpegs: JpegSize::Full,
            pixels: options.pixels,
            features: options.features.as_ref().map(|features| Arc::clone(&features.rows)),
            counters: Counters::default(),
        };
        let mut reader = EvalReader {
            workers: Workers::new(options.threads)?,
            preparer: Arc::new(preparer),
            pending: VecDeque::new(),
            ahead: options.range.start,
            quarantined: Vec::new(),
            options,
        };
        reader.decode_ahead();
        Ok(reader)
    }

    /// The samples that were left out since the last call.
    pub fn take_quarantined(&mut self) -> Vec<Quarantined> {
        std::mem::take(&mut self.quarantined)
    }

    fn decode_ahead(&mut self) {
        let reach = (self.options.prefetch * self.options.batch) as u64;
        let oldest = self.pending.front().map_or(self.ahead, |(first, _)| *first);
        let view = match &self.options.features {
            Some(EvalFeatures { position, .. }) => {
                View::OfImage { augment: Augment::None, view: 0, position: *position }
            }
            None => View::Evaluate,
        };
        self.preparer.corpus.prefetch_samples(oldest..oldest.saturating_add(reach));
        while self.pending.len() < self.options.prefetch && self.ahead < self.options.range.end {
            let first = self.ahead;
            let count = (self.options.range.end - first).min(self.options.batch as u64);
            let (preparer, left_out) = (Arc::clone(&self.preparer), Arc::clone(&self.options.left_out));
            let prepare = move |at: usize| {
                let index = first + at as u64;
                if left_out.contains(&index) {
                    return Ok(None);
                }
                preparer.prepare(index, view, Pick::First).map(Some).map_err(|error| (index, error))
            };
            self.pending.push_back((first, self.workers.start(count as usize, prepare)));
            self.ahead += count;
        }
    }
}

impl Iterator for EvalReader {
    type Item = Result<HostBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (first, pending) = self.pending.pop_front()?;
            let Some(results) = pending.wait() else {
                return Some(Err(DataError::LostThread { position: first }));
            };
            self.decode_ahead();
            let mut samples = Vec::with_capacity(results.len());
            for result in results {
                match result {
                    Ok(None) => {}
                    Ok(Some(sample)) => samples.push((sample.index, sample)),
                    Err((_, SampleError::Machine(error))) => {
                        self.pending.clear();
                        self.ahead = self.options.range.end;
                        return Some(Err(*error));
                    }
                    Err((index, error)) => self.quarantined.push(self.preparer.quarantine(index, &error)),
                }
            }
            if !samples.is_empty() {
                let padding = Padding { id: self.options.pad_id, multiple: self.options.pad_to_multiple };
                return Some(Ok(collate(samples, 0, self.options.image_size, padding)));
            }
        }
    }
}

impl Drop for EvalReader {
    /// Until the next pass others may have the shard cache's room.
    fn drop(&mut self) {
        self.preparer.corpus.let_go();
    }
}
