//! The data sets of a mixture as one row of samples.

use std::ops::Range;

use crate::text::caption::{Pick, Usable};
use crate::{CacheUse, DataError, Dataset, MixtureSet, Problem, RawSample, SampleError, Shard};

/// Data sets with their weights. A sample's index counts through all of them.
pub struct Corpus {
    sets: Vec<(Dataset, f64)>,
    /// Index of the first sample of each set, and the number of all.
    starts: Vec<u64>,
}

impl Corpus {
    /// These data sets with the weights by which they are drawn from.
    ///
    /// # Errors
    /// When there is none, or they say of more samples than can be counted.
    pub fn new(sets: Vec<(Dataset, f64)>) -> Result<Corpus, DataError> {
        if sets.is_empty() {
            return Err(DataError::Option {
                option: "data sets",
                expected: "at least 1".to_owned(),
                got: "0".to_owned(),
            });
        }
        let (mut starts, mut samples) = (vec![0], 0u64);
        for (set, _) in &sets {
            samples = samples.checked_add(set.len()).ok_or(DataError::TooManySamples)?;
            starts.push(samples);
        }
        Ok(Corpus { sets, starts })
    }

    /// Number of samples in all sets.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there is no sample; an open data set has at least one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The data sets.
    pub fn sets(&self) -> impl ExactSizeIterator<Item = &Dataset> {
        self.sets.iter().map(|(set, _)| set)
    }

    /// What the order law is made of.
    pub fn mixture(&self) -> Vec<MixtureSet> {
        self.sets.iter().map(|(set, weight)| MixtureSet { counts: set.counts(), weight: *weight }).collect()
    }

    /// What the shards hold that cannot be used.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.sets().flat_map(Dataset::problems)
    }

    /// A digest of the shards of all sets: the same shards in other folders have the same digest.
    pub fn digest(&self) -> String {
        match self.sets.as_slice() {
            [(only, _)] => only.digest(),
            sets => {
                let mut hasher = blake3::Hasher::new();
                sets.iter().for_each(|(set, _)| {
                    hasher.update(set.digest().as_bytes());
                });
                hasher.finalize().to_hex().to_string()
            }
        }
    }

    /// Equal for the same samples with the same captions: the digest with what filters and caption rules make of it.
    pub fn identity(&self) -> String {
        let sets = self.sets().map(|set| format!("{} {:?} {:?}", set.digest(), set.filter(), set.captions()));
        sets.collect::<Vec<_>>().join("; ")
    }

    /// Shard name and key of a sample.
    ///
    /// # Errors
    /// As [`Dataset::key`].
    pub fn key(&self, index: u64) -> Result<(String, String), DataError> {
        let (set, own) = self.find(index).ok_or(DataError::OutOfRange { index, len: self.len() })?;
        set.key(own)
    }

    /// A sample's data set, and its index in there.
    pub fn find(&self, index: u64) -> Option<(&Dataset, u64)> {
        if index >= self.len() {
            return None;
        }
        let set = self.starts.partition_point(|&start| start <= index) - 1;
        Some((&self.sets[set].0, index - self.starts[set]))
    }

    /// A sample's shard and its place in there.
    pub fn place(&self, index: u64) -> Option<(&Shard, u64)> {
        let (set, own) = self.find(index)?;
        set.place(own)
    }

    /// Shard and key of a sample as far as they can be had; see [`Dataset::named`].
    pub(crate) fn named(&self, index: u64) -> (String, String) {
        self.find(index).map(|(set, own)| set.named(own)).unwrap_or_default()
    }

    /// Whether some shards have to be fetched.
    pub fn is_remote(&self) -> bool {
        self.sets().any(Dataset::is_remote)
    }

    /// Begins to fetch shards of each set that lie elsewhere; see [`Dataset::prefetch`].
    pub fn prefetch(&self, shards: &[Vec<usize>]) {
        self.sets().zip(shards).for_each(|(set, shards)| set.prefetch(shards));
    }

    /// As [`Corpus::prefetch`], for the shards of consecutive samples.
    pub(crate) fn prefetch_samples(&self, samples: Range<u64>) {
        for (place, set) in self.sets().enumerate() {
            let (start, end) = (self.starts[place], self.starts[place + 1]);
            let own = samples.start.clamp(start, end) - start..samples.end.clamp(start, end) - start;
            if own.is_empty() {
                set.prefetch(&[]);
            } else {
                set.prefetch_samples(own);
            }
        }
    }

    /// Lets go of the shards that were fetched.
    pub(crate) fn let_go(&self) {
        self.sets().for_each(|set| set.prefetch(&[]));
    }

    /// Says that any `count` shards of each of these sets are read from in turn.
    pub(crate) fn keep_open(&self, count: usize) {
        self.sets().for_each(|set| set.keep_open(count));
    }

    /// Whether the shard cache can hold what is in use at once: `count` shards of each of these sets, which is `what`, and
    /// what else this process reads.
    ///
    /// # Errors
    /// When it cannot.
    pub(crate) fn check_cache(&self, count: usize, what: &str) -> Result<(), DataError> {
        self.sets().for_each(|set| set.claim_cache(count));
        let what = format!("{what}, with what else this process reads,");
        self.sets().try_for_each(|set| set.check_cache(&what))
    }

    /// What the shard cache was good for, for all sets together; `None` where no shard has to be fetched.
    pub fn cache_use(&self) -> Option<CacheUse> {
        self.sets().filter_map(Dataset::cache_use).reduce(|mut sum, set| {
            sum += set;
            sum
        })
    }

    /// Reads a sample's image and caption.
    ///
    /// # Errors
    /// As [`Dataset::read`].
    pub fn read(&self, index: u64, pick: Pick) -> Result<RawSample, SampleError> {
        self.read_usable(index, pick, &|_| true)
    }

    /// As [`Corpus::read`]; of several captions one that is usable, where there is one.
    pub(crate) fn read_usable(&self, index: u64, pick: Pick, usable: Usable<'_>) -> Result<RawSample, SampleError> {
        let (set, own) = self.find(index).ok_or(SampleError::NoSuchSample(index))?;
        set.read_usable(own, pick, usable)
    }
}

impl From<Dataset> for Corpus {
    fn from(dataset: Dataset) -> Corpus {
        Corpus { starts: vec![0, dataset.len()], sets: vec![(dataset, 1.0)] }
    }
}
