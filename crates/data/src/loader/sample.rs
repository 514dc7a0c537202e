//! One sample, from its place in the shards to pixels and token ids; and the list of those that failed.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::feature_store::{FeatureRow, RunFeatures, view_frame};
use crate::image::{Augment, DecodeError, Filter, Frame, JpegSize, Picture, RgbImage, Scale};
use crate::loader::timings::{Counters, Phase};
use crate::text::caption::Pick;
use crate::text::says_something;
use crate::{Clean, Corpus, SampleError, TextEncoder, clean_caption};

/// A sample ready to be put into a batch.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) index: u64,
    pub(crate) image_id: u64,
    /// `[3, size, size]`
    pub(crate) pixels: Option<Vec<u8>>,
    /// With a feature store.
    pub(crate) features: Option<FeatureRow>,
    pub(crate) ids: Vec<u32>,
    pub(crate) caption: String,
    pub(crate) answers: Vec<String>,
}

/// How an image is brought to its size.
#[derive(Debug, Clone, Copy)]
pub(crate) enum View {
    /// The evaluation transform.
    Evaluate,
    /// The augmentation that belongs to a stream position.
    Train { seed: u64, position: u64 },
    /// One of an image's views, whose features may be stored; `position` is the stream's, of an evaluation the one that it is made at.
    OfImage { augment: Augment, view: u64, position: u64 },
}

impl View {
    /// What of an image of these sides is shown.
    fn frame(self, width: usize, height: usize, image_id: u64) -> Frame {
        match self {
            View::Evaluate => Frame::whole(width, height),
            View::Train { seed, position } => Frame::crop_flip(width, height, seed, position),
            View::OfImage { augment, view, .. } => view_frame(width, height, augment, image_id, view),
        }
    }
}

/// Reads, decodes, transforms and tokenises.
pub(crate) struct Preparer {
    pub(crate) corpus: Arc<Corpus>,
    pub(crate) text: Arc<TextEncoder>,
    pub(crate) clean: Clean,
    pub(crate) image_size: usize,
    pub(crate) filter: Filter,
    pub(crate) jpegs: JpegSize,
    pub(crate) pixels: bool,
    pub(crate) features: Option<Arc<RunFeatures>>,
    pub(crate) counters: Counters,
}

impl Preparer {
    /// The sample `index`; a panic on the way is a bad sample too, not the end of the run.
    pub(crate) fn prepare(&self, index: u64, view: View, pick: Pick) -> Result<Sample, SampleError> {
        guarded(|| self.prepare_unguarded(index, view, pick))
    }

    fn prepare_unguarded(&self, index: u64, view: View, pick: Pick) -> Result<Sample, SampleError> {
        let usable = |text: &str| says_something(text, self.clean);
        let raw = self.counters.time(Phase::Read, || self.corpus.read_usable(index, pick, &usable))?;
        let (caption, ids) = self.counters.time(Phase::Text, || self.tokenise(&raw.caption))?;
        let image_id = xxh3_64(&raw.image);
        let (features, there) = self.counters.time(Phase::Read, || self.stored(index, image_id, view));
        let pixels = match self.pixels && !there {
            true => {
                let decode = || self.decode(&raw.image, image_id, view);
                let (frame, image, scale) = self.counters.time(Phase::Decode, decode)?;
                let pixels = || frame.pixels(&image, scale, self.image_size, self.filter);
                Some(self.counters.time(Phase::Resize, pixels))
            }
            false => None,
        };
        self.counters.prepared(raw.image.len());
        Ok(Sample { index, image_id, pixels, features, ids, caption, answers: raw.answers })
    }

    fn decode(&self, bytes: &[u8], image_id: u64, view: View) -> Result<(Frame, RgbImage, Scale), DecodeError> {
        let mut picture = Picture::open(bytes, self.jpegs)?;
        let frame = view.frame(picture.width, picture.height, image_id);
        let (image, scale) = picture.decode(picture.scale(&frame, self.image_size))?;
        Ok((frame, image, scale))
    }

    fn tokenise(&self, caption: &str) -> Result<(String, Vec<u32>), SampleError> {
        let caption = clean_caption(caption, self.clean);
        if caption.is_empty() {
            return Err(SampleError::CaptionEmpty);
        }
        let ids = self.text.encode(&caption)?;
        Ok((caption, ids))
    }

    /// The sample's row of the feature store, and whether the step or evaluation that needs it can count on it. One that this run has stored
    /// then or later, before it was killed, may have to be encoded once more: then there are both, row and pixels.
    fn stored(&self, index: u64, image_id: u64, view: View) -> (Option<FeatureRow>, bool) {
        let (Some(features), View::OfImage { view, position, .. }) = (&self.features, view) else {
            return (None, false);
        };
        let stored = features.read(index, view, image_id).map(Arc::new);
        let there = stored.as_deref().is_some_and(|row| features.was_there(row, position));
        (Some(FeatureRow { view, position, stored }), there)
    }

    /// The entry that says why sample `index` is not used.
    pub(crate) fn quarantine(&self, index: u64, error: &SampleError) -> Quarantined {
        quarantine(&self.corpus, index, error)
    }
}

/// The entry that says why sample `index` of a set is not used.
pub(crate) fn quarantine(corpus: &Corpus, index: u64, error: &SampleError) -> Quarantined {
    let (shard, key) = corpus.named(index);
    Quarantined { shard, key, index, reason: error.to_string() }
}

/// Runs what decodes a sample; a panic in it becomes the sample's error.
pub(crate) fn guarded<T>(job: impl FnOnce() -> Result<T, SampleError>) -> Result<T, SampleError> {
    caught(job).unwrap_or_else(|message| Err(SampleError::Panic(message)))
}

/// Runs what reads files of others; a panic in it becomes its message.
pub(crate) fn caught<T>(job: impl FnOnce() -> T) -> Result<T, String> {
    // Nothing is shared with the job but the data set, whose locks recover from poison, or what is given up with it.
    catch_unwind(AssertUnwindSafe(job)).map_err(|payload| panic_message(payload.as_ref()))
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A sample that could not be used: a line of `quarantine.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// File name of its shard.
    pub shard: String,
    /// Its key; empty when not even the index can be read any more.
    pub key: String,
    /// Its index in the data set, or through all sets of a mixture.
    pub index: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Quarantined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard {}, key {}: {}", self.shard, self.key, self.reason)
    }
}

/// The samples that are not tried again. Part of the checkpoint: whether a read fails is not a function of the seed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadSamples {
    /// Data set index, and the stream position at which the sample failed.
    found: BTreeMap<u64, u64>,
}

impl BadSamples {
    /// Whether the sample is in the list.
    pub fn contains(&self, index: u64) -> bool {
        self.found.contains_key(&index)
    }

    /// Number of samples in the list.
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The indices in the list.
    pub fn indices(&self) -> impl Iterator<Item = u64> + '_ {
        self.found.keys().copied()
    }

    /// Puts a sample into the list that failed at stream position `position`.
    pub fn insert(&mut self, index: u64, position: u64) {
        self.found.entry(index).or_insert(position);
    }

    /// Takes over what another rank found; of two positions the earlier one stays.
    pub fn merge(&mut self, other: &BadSamples) {
        for (&index, &position) in &other.found {
            let entry = self.found.entry(index).or_insert(position);
            *entry = position.min(*entry);
        }
    }

    /// Share of unreadable samples among the last `window` that were drawn before stream position `position`.
    pub fn rate(&self, position: u64, window: u64) -> f64 {
        let first = position.saturating_sub(window);
        let found = self.positions().filter(|found| (first..position).contains(found)).count();
        found as f64 / (position - first).max(1) as f64
    }

    /// The stream positions at which they failed.
    pub(crate) fn positions(&self) -> impl Iterator<Item = u64> + '_ {
        self.found.values().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_is_the_same_from_both_sides() {
        let list = |entries: &[(u64, u64)]| {
            let mut bad = BadSamples::default();
            entries.iter().for_each(|&(index, position)| bad.insert(index, position));
            bad
        };
        let (a, b) = (list(&[(1, 10), (2, 20)]), list(&[(2, 15), (3, 30)]));
        let (mut ab, mut ba) = (a.clone(), b.clone());
        ab.merge(&b);
        ba.merge(&a);
        assert_eq!(ab, ba);
        assert_eq!(ab, list(&[(1, 10), (2, 15), (3, 30)]));
        assert_eq!(ab.positions().collect::<Vec<_>>(), [10, 15, 30]);
        assert_eq!([ab.rate(0, 10), ab.rate(5, 10), ab.rate(20, 10), ab.rate(31, 100)], [0.0, 0.0, 0.2, 3.0 / 31.0]);
    }

    #[test]
    fn a_panic_is_the_samples_error() {
        let error = guarded::<()>(|| panic!("index {}\nout of range", 7)).unwrap_err();
        assert_eq!(error.to_string(), "the decoder panicked: index 7 out of range");
    }

    #[test]
    fn the_list_survives_a_checkpoint() {
        let mut bad = BadSamples::default();
        bad.insert(7, u64::MAX);
        let text = serde_json::json!(bad).to_string();
        assert_eq!(serde_json::from_str::<BadSamples>(&text).unwrap(), bad);
    }
}
