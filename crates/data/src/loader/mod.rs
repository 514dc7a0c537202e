//! The training stream, decoded ahead of the step.
//!
//! A batch is a function of the seed, its position, the files and the list of bad samples as of the batch before.
//! Threads decode further ahead than that list reaches, so a batch is decided on when it is handed out: a sample that
//! was decoded in time, but that an earlier slot of the stream has found bad since, is replaced then as it would have
//! been without any looking ahead. So it does not matter either how much of the list the threads know.

pub(crate) mod collate;
pub(crate) mod eval;
pub(crate) mod sample;
pub(crate) mod throughput;
pub(crate) mod timings;
pub(crate) mod workers;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::iter;
use std::num::NonZero;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use crate::feature_store::RunFeatures;
use crate::image::{Augment, Filter, JpegSize};
use crate::loader::collate::{HostBatch, Padding, collate};
use crate::loader::sample::{BadSamples, Preparer, Quarantined, Sample, View};
use crate::loader::timings::{Counters, Timings};
use crate::loader::workers::{Queue, Workers};
use crate::text::caption::Pick;
use crate::{Clean, Corpus, DataError, Drawn, Mixture, SampleError, TextEncoder};

/// `max_bad_fraction` is of this many samples of a rank.
pub const BAD_WINDOW: u64 = 10_000;

/// Views that belong to the images, so that epochs, stages and runs share them.
#[derive(Debug, Clone)]
pub struct ImageViews {
    /// How many an image has; the epochs take them in turn.
    pub count: NonZero<u64>,
    /// Where their features are stored: an image whose features are there is not decoded.
    pub features: Option<Arc<RunFeatures>>,
}

/// What a training stream is made of.
#[derive(Debug, Clone)]
pub struct LoaderOptions {
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Samples a step, of all ranks.
    pub global_batch: usize,
    /// This process; it gets the `rank`-th of `world` contiguous slices of each global batch.
    pub rank: usize,
    /// Number of processes; a divisor of `global_batch`.
    pub world: usize,
    /// Stream position to begin at: a multiple of `global_batch`.
    pub start: u64,
    /// Stream position to end at, a multiple of `global_batch`; nothing is decoded beyond it.
    pub end: Option<u64>,
    /// Decoding threads.
    pub threads: usize,
    /// Batches decoded ahead.
    pub prefetch: usize,
    /// What is done to the images.
    pub augment: Augment,
    /// Side of the images in the batch.
    pub image_size: usize,
    /// How they are brought to it.
    pub filter: Filter,
    /// The size at which JPEGs are decoded.
    pub jpegs: JpegSize,
    /// Whether images are decoded; not when their features are cached.
    pub pixels: bool,
    /// `None`: every stream position has a view of its own.
    pub views: Option<ImageViews>,
    /// How captions are cleaned.
    pub clean: Clean,
    /// Lanes of the order law.
    pub lanes: usize,
    /// Shards a window of the order law.
    pub window_shards: usize,
    /// The part of the last 10,000 samples that may be bad.
    pub max_bad_fraction: f64,
    /// Token that pads texts.
    pub pad_id: i64,
    /// Padded lengths are multiples of this.
    pub pad_to_multiple: usize,
    /// Bad samples of the checkpoint, whichever rank found them: not tried again.
    pub bad: BadSamples,
    /// Samples that were known to be unusable before the stream began: not tried, and no fault of the stream's.
    pub left_out: Arc<HashSet<u64>>,
}

/// What the decoding threads share.
struct Stream {
    preparer: Preparer,
    order: Mixture,
    seed: u64,
    augment: Augment,
    views: Option<NonZero<u64>>,
    left_out: Arc<HashSet<u64>>,
    /// More failures than this stop the run, so nobody tries on.
    max_bad: usize,
}

/// A stream position with the sample that stands there, if any could be read.
struct Slot {
    position: u64,
    sample: Option<Sample>,
    /// Those tried before it, in the order of the law.
    failed: Vec<(u64, SampleError)>,
    /// Why this machine could not read on.
    broken: Option<Box<DataError>>,
}

impl Stream {
    /// The first sample for `position` that can be read, was not left out before, and that `is_bad` does not name.
    fn fill(&self, position: u64, is_bad: impl Fn(u64) -> bool) -> Slot {
        let mut failed = Vec::new();
        let located = self.order.locate(position);
        let candidates = iter::once(located.index).chain(self.order.window(position));
        let view = match (self.views, self.augment) {
            (Some(views), augment) => View::OfImage { augment, view: located.epoch % views, position },
            (None, Augment::None) => View::Evaluate,
            (None, Augment::CropFlip) => View::Train { seed: self.seed, position },
        };
        for index in candidates.filter(|index| !self.left_out.contains(index) && !is_bad(*index)) {
            let pick = Pick::Keyed { seed: self.seed, position };
            match self.preparer.prepare(index, view, pick) {
                Ok(sample) => {
                    return Slot { position, sample: Some(sample), failed, broken: None };
                }
                Err(SampleError::Machine(error)) => {
                    return Slot { position, sample: None, failed, broken: Some(error) };
                }
                Err(error) => failed.push((index, error)),
            }
            if failed.len() > self.max_bad {
                break;
            }
        }
        Slot { position, sample: None, failed, broken: None }
    }
}

/// Hands out one rank's slices of the global batches, in order.
pub struct Loader {
    // Dropped first: whatever is queued is not begun any more.
    workers: Workers,
    stream: Arc<Stream>,
    options: LoaderOptions,
    /// Global batches being decoded, by their first position.
    pending: Queue<Slot>,
    /// First position of the next global batch to decode.
    ahead: u64,
    /// As of the last batch handed out. It grows in place, under the eyes of the threads: it may be long, and copies of it
    /// would cost more with every sample that is found.
    bad: Arc<RwLock<BadSamples>>,
    /// Those of them that [`Loader::take_found`] has not told yet.
    found: BadSamples,
    /// The positions of this rank at which those were found that `max_bad_fraction` still counts.
    recent: BinaryHeap<Reverse<u64>>,
    quarantined: Vec<Quarantined>,
    last_wait_s: f64,
}

impl Loader {
    /// Starts to decode at `options.start`.
    ///
    /// # Errors
    /// When an option is out of range or contradicts another, or threads cannot be started.
    pub fn new(corpus: Arc<Corpus>, text: Arc<TextEncoder>, options: LoaderOptions) -> Result<Loader, DataError> {
        options.check()?;
        let LoaderOptions { seed, lanes, global_batch, window_shards, .. } = options;
        let order = Mixture::new(&corpus.mixture(), seed, lanes, global_batch, window_shards)?;
        let windows = order.lanes_of(&options.slots()).count() * window_shards;
        // Those that lanes read from, and those of a window that one of them goes over to.
        corpus.keep_open(windows + window_shards);
        corpus
            .check_cache(windows, &format!("the windows of this rank's lanes, up to {windows} shards of each set"))?;
        let stream = Stream {
            preparer: Preparer {
                corpus,
                text,
                clean: options.clean,
                image_size: options.image_size,
                filter: options.filter,
                jpegs: options.jpegs,
                pixels: options.pixels,
                features: options.views.as_ref().and_then(|views| views.features.clone()),
                counters: Counters::default(),
            },
            order,
            seed: options.seed,
            augment: options.augment,
            views: options.views.as_ref().map(|views| views.count),
            left_out: Arc::clone(&options.left_out),
            max_bad: (options.max_bad_fraction * BAD_WINDOW as f64) as usize,
        };
        // The list is that of all ranks, `max_bad_fraction` a share of what this one reads.
        let (slots, batch) = (options.slots(), options.global_batch as u64);
        let own = options.bad.positions().filter(|position| slots.contains(&(position % batch)));
        let mut loader = Loader {
            workers: Workers::new(options.threads)?,
            stream: Arc::new(stream),
            pending: VecDeque::new(),
            ahead: options.start,
            recent: own.map(Reverse).collect(),
            bad: Arc::new(RwLock::new(options.bad.clone())),
            found: BadSamples::default(),
            quarantined: Vec::new(),
            last_wait_s: 0.0,
            options,
        };
        loader.decode_ahead();
        Ok(loader)
    }

    /// This rank's slice of the next global batch.
    ///
    /// # Errors
    /// At the end of a bounded stream, when too many samples are bad, or when a whole window is. When this machine or its
    /// shard cache is at fault, no sample is bad, and the next call begins anew with the same batch.
    pub fn next_batch(&mut self) -> Result<HostBatch, DataError> {
        if self.pending.is_empty() {
            self.decode_ahead();
        }
        let (first, told) = (self.pending.front().map(|(first, _)| *first), self.quarantined.len());
        let batch = self.take_batch();
        if let (Err(error), Some(first)) = (&batch, first)
            && error.is_of_this_machine()
        {
            self.quarantined.truncate(told);
            self.pending.clear();
            self.ahead = first - self.options.slots().start;
        }
        batch
    }

    fn take_batch(&mut self) -> Result<HostBatch, DataError> {
        let Some((first, pending)) = self.pending.pop_front() else {
            return Err(DataError::EndOfStream { end: self.ahead });
        };
        let begin = Instant::now();
        let mut slots = pending.wait().ok_or(DataError::LostThread { position: first })?;
        if let Some(error) = slots.iter_mut().find_map(|slot| slot.broken.take()) {
            return Err(*error);
        }
        self.last_wait_s = begin.elapsed().as_secs_f64();

        let mut found = BadSamples::default();
        let mut samples = Vec::with_capacity(slots.len());
        for slot in slots {
            samples.push((slot.position, self.good_sample(slot, &mut found)?));
        }
        if !found.is_empty() {
            self.bad.write().unwrap_or_else(PoisonError::into_inner).merge(&found);
            self.found.merge(&found);
        }
        self.decode_ahead();

        let epoch = samples.first().map_or(0, |(position, _)| self.stream.order.locate(*position).epoch);
        let padding = Padding { id: self.options.pad_id, multiple: self.options.pad_to_multiple };
        Ok(collate(samples, epoch, self.options.image_size, padding))
    }

    /// What was found bad since the last call.
    pub fn take_quarantined(&mut self) -> Vec<Quarantined> {
        std::mem::take(&mut self.quarantined)
    }

    /// The list for the checkpoint: exactly what the batches handed out have found, and what the loader began with.
    pub fn bad(&self) -> BadSamples {
        reading(&self.bad).clone()
    }

    /// What of that list was found since the last call.
    pub fn take_found(&mut self) -> BadSamples {
        std::mem::take(&mut self.found)
    }

    /// How long the last call of [`Loader::next_batch`] waited for the decoding threads.
    pub fn last_wait_s(&self) -> f64 {
        self.last_wait_s
    }

    /// How far each data set has been read when the stream is at `position`, the beginning of a global batch.
    pub fn drawn(&self, position: u64) -> Vec<Drawn> {
        self.stream.order.drawn(position)
    }

    /// Where the time of the decoding threads went so far.
    pub fn timings(&self) -> Timings {
        self.stream.preparer.counters.read()
    }

    fn decode_ahead(&mut self) {
        if self.stream.preparer.corpus.is_remote() {
            let oldest = self.pending.front().map_or(self.ahead, |(first, _)| *first);
            let ahead = self.stream.order.shards_ahead(oldest, self.options.prefetch, &self.options.slots());
            self.stream.preparer.corpus.prefetch(&ahead);
        }
        let slice = self.options.global_batch / self.options.world;
        while self.pending.len() < self.options.prefetch && self.options.end.is_none_or(|end| self.ahead < end) {
            let first = self.ahead + (self.options.rank * slice) as u64;
            let (stream, bad) = (Arc::clone(&self.stream), Arc::clone(&self.bad));
            let fill = move |slot: usize| stream.fill(first + slot as u64, |index| reading(&bad).contains(index));
            self.pending.push_back((first, self.workers.start(slice, fill)));
            self.ahead += self.options.global_batch as u64;
        }
    }

    /// The sample of a slot or the next good one of its window, given all that the stream has found bad before it: in
    /// earlier batches, and, as in `found`, in this one.
    fn good_sample(&mut self, mut slot: Slot, found: &mut BadSamples) -> Result<Sample, DataError> {
        let bad = Arc::clone(&self.bad);
        let is_bad = |found: &BadSamples, index| found.contains(index) || reading(&bad).contains(index);
        if slot.sample.as_ref().is_some_and(|sample| is_bad(found, sample.index)) {
            slot = self.stream.fill(slot.position, |index| is_bad(found, index));
        }
        if let Some(error) = slot.broken {
            return Err(*error);
        }
        for (index, error) in &slot.failed {
            if !is_bad(found, *index) {
                found.insert(*index, slot.position);
                self.recent.push(Reverse(slot.position));
                self.quarantined.push(self.stream.preparer.quarantine(*index, error));
            }
        }
        // The stream is shared by all ranks: this one has seen 10,000 samples in `world` times as many positions.
        let looked_back = slot.position.saturating_sub(BAD_WINDOW * self.options.world as u64 - 1);
        while self.recent.peek().is_some_and(|Reverse(position)| *position < looked_back) {
            self.recent.pop();
        }
        let found = if slot.failed.is_empty() { 0 } else { self.recent.len() };
        if found > self.stream.max_bad {
            return Err(DataError::TooManyBad {
                found,
                window: BAD_WINDOW,
                max_fraction: self.options.max_bad_fraction,
                last: self.last_quarantined(),
            });
        }
        slot.sample.ok_or_else(|| DataError::WindowUnreadable {
            position: slot.position,
            samples: 1 + self.stream.order.window(slot.position).count() as u64,
            last: self.last_quarantined(),
        })
    }

    fn last_quarantined(&self) -> String {
        self.quarantined.last().map_or("reported before".to_owned(), Quarantined::to_string)
    }
}

fn reading(bad: &RwLock<BadSamples>) -> RwLockReadGuard<'_, BadSamples> {
    // What is written is written by the loader's own thread, whole entries at a time.
    bad.read().unwrap_or_else(PoisonError::into_inner)
}

impl LoaderOptions {
    /// This rank's slots of a global batch.
    fn slots(&self) -> Range<u64> {
        let slice = (self.global_batch / self.world) as u64;
        self.rank as u64 * slice..(self.rank as u64 + 1) * slice
    }

    fn check(&self) -> Result<(), DataError> {
        let mut errors = Vec::new();
        let mut demand = |holds: bool, option: &'static str, expected: &str, got: String| {
            if !holds {
                errors.push(DataError::Option { option, expected: expected.to_owned(), got });
            }
        };
        for (option, value) in [
            ("global_batch", self.global_batch),
            ("world", self.world),
            ("threads", self.threads),
            ("prefetch", self.prefetch),
            ("image_size", self.image_size),
            ("pad_to_multiple", self.pad_to_multiple),
        ] {
            demand(value > 0, option, "at least 1", value.to_string());
        }
        let batch = self.global_batch.max(1);
        let divides = self.world > 0 && batch.is_multiple_of(self.world);
        demand(divides, "world", &format!("a divisor of the global batch {batch}"), self.world.to_string());
        demand(self.rank < self.world, "rank", &format!("below world {}", self.world), self.rank.to_string());
        for (option, position) in [("start", Some(self.start)), ("end", self.end)] {
            let position = position.unwrap_or(0);
            let expected = format!("a multiple of the global batch {batch}");
            demand(position.is_multiple_of(batch as u64), option, &expected, position.to_string());
        }
        let fraction = self.max_bad_fraction;
        demand((0.0..=1.0).contains(&fraction), "max_bad_fraction", "0 to 1", fraction.to_string());
        if errors.is_empty() { Ok(()) } else { Err(DataError::from_list(errors)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{corpus, loader_options, shards, text};

    /// A read can fail once and succeed later. A thread far ahead may have read the sample that an earlier slot then
    /// finds bad; the batch must not depend on which of the two was first.
    #[test]
    fn what_was_decoded_ahead_yields_to_what_was_found_bad_since() {
        let folder = shards(&[6], |_| false);
        let mut loader = Loader::new(corpus(folder.path()), text(), loader_options()).unwrap();
        let stream = Arc::clone(&loader.stream);
        let ahead = || stream.fill(3, |_| false);
        let index = stream.order.locate(3).index;
        let next = stream.order.window(3).next().unwrap();

        let mut found = BadSamples::default();
        assert_eq!(loader.good_sample(ahead(), &mut found).unwrap().index, index);
        let mut bad = found.clone();
        bad.insert(index, 1);
        let known = stream.fill(3, |candidate| candidate == index).sample.unwrap();
        // Found in this batch, or in one before.
        for (mut found, before) in [(bad.clone(), BadSamples::default()), (BadSamples::default(), bad)] {
            *loader.bad.write().unwrap() = before;
            let replacement = loader.good_sample(ahead(), &mut found).unwrap();
            assert_eq!(replacement.index, next);
            assert_eq!(replacement.pixels, known.pixels);
            assert_eq!(found.len() + loader.bad().len(), 1);
        }
    }

    /// A list of a million samples must not be copied for each one that joins it.
    #[test]
    fn the_list_of_bad_samples_grows_in_place() {
        let folder = shards(&[12], |index| index % 6 == 1);
        let mut loader = Loader::new(corpus(folder.path()), text(), loader_options()).unwrap();
        let shared = Arc::clone(&loader.bad);
        (0..3).for_each(|_| drop(loader.next_batch().unwrap()));
        assert_eq!(reading(&shared).indices().collect::<Vec<_>>(), [1, 7]);
        assert_eq!(*reading(&shared), loader.bad());
    }

    #[test]
    fn only_what_was_found_lately_counts() {
        let folder = shards(&[6], |_| false);
        let mut bad = BadSamples::default();
        (100..220).for_each(|index| bad.insert(index, index - 100));
        let begun = LoaderOptions { bad, start: 10_000, ..loader_options() };
        let mut loader = Loader::new(corpus(folder.path()), text(), begun.clone()).unwrap();
        let failed = |loader: &Loader, position, index| {
            let mut slot = loader.stream.fill(position, |_| false);
            slot.failed.push((index, SampleError::CaptionEmpty));
            slot
        };
        // 100 of 10,000 may be bad. At 10,017 those from 18 to 119 count, and the new one.
        let slot = failed(&loader, 10_017, 0);
        let error = loader.good_sample(slot, &mut BadSamples::default()).unwrap_err();
        assert!(matches!(error, DataError::TooManyBad { found: 103, .. }), "{error}");
        let mut loader = Loader::new(corpus(folder.path()), text(), begun).unwrap();
        let slot = failed(&loader, 10_020, 0);
        assert!(loader.good_sample(slot, &mut BadSamples::default()).is_ok());
    }

    /// A checkpoint has the list of all ranks. Each of them may have its share of bad samples without that of the others.
    #[test]
    fn what_other_ranks_found_does_not_count() {
        let folder = shards(&[6], |_| false);
        let mut bad = BadSamples::default();
        // Sixty found by either of two ranks, of a hundred that each may have.
        (0..120).for_each(|position| bad.insert(100 + position, position));
        for rank in 0..2 {
            let options = LoaderOptions { bad: bad.clone(), start: 160, rank, world: 2, ..loader_options() };
            let mut loader = Loader::new(corpus(folder.path()), text(), options).unwrap();
            let position = 160 + 4 * rank as u64;
            let mut slot = loader.stream.fill(position, |_| false);
            slot.failed.push((0, SampleError::CaptionEmpty));
            assert!(loader.good_sample(slot, &mut BadSamples::default()).is_ok(), "rank {rank}");
            assert_eq!(loader.recent.len(), 61);
        }
    }

    #[test]
    fn what_was_left_out_before_is_not_tried_and_no_fault() {
        let folder = shards(&[6, 6], |index| index % 6 == 1);
        let left_out = Arc::new([1, 7].into());
        let options = LoaderOptions { left_out, max_bad_fraction: 0.0, ..loader_options() };
        let mut loader = Loader::new(corpus(folder.path()), text(), options).unwrap();
        for _ in 0..6 {
            let batch = loader.next_batch().unwrap();
            assert!(batch.sample_index.iter().all(|index| index % 6 != 1), "{:?}", batch.sample_index);
        }
        assert!(loader.bad().is_empty() && loader.take_quarantined().is_empty());
    }

    #[test]
    fn what_was_found_is_told_once_and_stays_in_the_list() {
        let folder = shards(&[12], |index| index % 6 == 1);
        let mut known = BadSamples::default();
        known.insert(3, 0);
        let options = LoaderOptions { bad: known.clone(), ..loader_options() };
        let mut loader = Loader::new(corpus(folder.path()), text(), options).unwrap();
        let mut all = known;
        for _ in 0..4 {
            loader.next_batch().unwrap();
            let found = loader.take_found();
            assert!(found.indices().all(|index| !all.contains(index)));
            all.merge(&found);
            assert_eq!(all, loader.bad());
        }
        assert_eq!(all.indices().collect::<Vec<_>>(), [1, 3, 7]);
    }

    #[test]
    fn a_sample_found_bad_twice_is_reported_once() {
        let folder = shards(&[6], |_| false);
        let mut loader = Loader::new(corpus(folder.path()), text(), loader_options()).unwrap();
        let mut found = BadSamples::default();
        for position in [3, 4] {
            let mut slot = loader.stream.fill(position, |index| index == 0);
            slot.failed.push((0, SampleError::CaptionEmpty));
            loader.good_sample(slot, &mut found).unwrap();
        }
        let entries = loader.take_quarantined();
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].to_string(), "shard 00.tar, key 0000: caption is empty");
        assert_eq!(found.positions().collect::<Vec<_>>(), [3]);
    }
}
