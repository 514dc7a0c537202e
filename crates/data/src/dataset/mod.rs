//! One split of image-text pairs: its shards, their sample counts, and any sample by its index.

pub(crate) mod attributes;
pub(crate) mod corpus;
pub(crate) mod filter;
pub(crate) mod loaded;
pub(crate) mod measure;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::dataset::attributes::AttributesFile;
use crate::dataset::filter::{Passed, SampleFilter};
use crate::dataset::loaded::LoadedShards;
use crate::image::ImageFormat;
use crate::remote::Remote;
use crate::shards::index::{Digest, IndexedSample, Member};
use crate::shards::scan::Problem;
use crate::shards::shard::{Indices, OpenShard, Shard, Shards};
use crate::text::caption::{CaptionMembers, CaptionRule, Pick, Usable};
use crate::{CacheUse, DataError, RemoteOptions, SampleError};

/// How a data set is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// Where relative patterns start.
    pub base_dir: PathBuf,
    /// Where indices go whose shard lies in a folder that cannot be written.
    pub cache_dir: Option<PathBuf>,
    /// Whether indices may be written beside their shards; else they go into `cache_dir`.
    pub write_beside: bool,
    /// Which text of a sample is its caption.
    pub captions: CaptionRule,
    /// Which samples are in the set.
    pub filter: SampleFilter,
    /// How shards are fetched and kept that lie elsewhere.
    pub remote: RemoteOptions,
    /// A shard that cannot be read at all becomes a problem of the set instead of an error, unless this machine is at fault:
    /// to list all that is wrong.
    pub tolerate_unreadable: bool,
    /// Called after each shard with the number of shards done and of all.
    pub progress: Option<Arc<dyn Fn(usize, usize) + Send + Sync>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            base_dir: PathBuf::from("."),
            cache_dir: None,
            write_beside: true,
            captions: CaptionRule::default(),
            filter: SampleFilter::default(),
            remote: RemoteOptions::default(),
            tolerate_unreadable: false,
            progress: None,
        }
    }
}

/// A sample as it stands in the shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawSample {
    /// File name of its shard.
    pub shard: String,
    /// Its key.
    pub key: String,
    /// The image file.
    pub image: Vec<u8>,
    /// The caption, before cleaning.
    pub caption: String,
    /// Where the caption is a question: people's answers to it.
    pub answers: Vec<String>,
}

/// All shards of one split. Their sample counts stay in memory; their indices come and go.
pub struct Dataset {
    shards: Shards,
    /// Index of the first sample of each shard, and the number of all: those that pass the filter.
    starts: Vec<u64>,
    /// Digest of the places of each shard's samples that pass; empty where all do.
    selections: Vec<Digest>,
    captions: CaptionRule,
    filter: SampleFilter,
    loaded: Arc<LoadedShards<Loaded>>,
}

/// What is said of a sample without reading its image whole.
pub(crate) struct SampleHeader {
    pub(crate) format: ImageFormat,
    /// Pixels a row.
    pub(crate) width: usize,
    /// Rows.
    pub(crate) height: usize,
    /// Length of the image file.
    pub(crate) image_bytes: u64,
    /// Before cleaning.
    pub(crate) caption: String,
}

/// A shard in use.
struct Loaded {
    shard: OpenShard,
    /// Places in the index of the samples that pass the filter; `None`: of all.
    selected: Option<Vec<u32>>,
}

/// How long a cache that seems too small is waited for.
const CLAIM_GRACE: Duration = Duration::from_secs(1);

impl Dataset {
    /// Opens the shards that `patterns` name: files, globs, URLs or manifests. Indices that are missing or stale are
    /// built; of shards that lie elsewhere a manifest is kept in the shard cache, from which they open the next time.
    ///
    /// # Errors
    /// All at once: patterns and files that are wrong, shards that are no tar files; or that there is no usable sample.
    pub fn open(patterns: &[String], options: &OpenOptions) -> Result<Dataset, DataError> {
        let shards = Shards::open(patterns, options, Indices::Keep)?;
        // Those that pass a filter are no more than these.
        let indexed = sum(shards.all.iter().map(|shard| shard.samples)).ok_or(DataError::TooManySamples)?;
        if indexed == 0 {
            return Err(DataError::NoSamples {
                shards: shards.all.len(),
                problems: shards.problems.len(),
                first: shards.problems.first().map_or("none".to_owned(), ToString::to_string),
            });
        }
        let mut dataset = Dataset {
            shards,
            starts: Vec::new(),
            selections: Vec::new(),
            captions: options.captions.clone(),
            filter: options.filter.clone(),
            loaded: Arc::default(),
        };
        if let Some(remote) = dataset.shards.remote() {
            let loaded = Arc::downgrade(&dataset.loaded);
            remote.close_idle_with(move || loaded.upgrade().is_some_and(|loaded| loaded.close_one()));
        }
        let counts = dataset.count(options)?;
        let mut samples = 0;
        dataset.starts.push(0);
        dataset.starts.extend(counts.iter().map(|count| {
            samples += count;
            samples
        }));
        match dataset.len() {
            0 => Err(DataError::NothingPasses(dataset.passed())),
            _ => Ok(dataset),
        }
    }

    /// Samples of each shard that pass the filter.
    fn count(&mut self, options: &OpenOptions) -> Result<Vec<u64>, DataError> {
        if self.filter.is_open() {
            return Ok(self.shards.all.iter().map(|shard| shard.samples).collect());
        }
        let done = AtomicUsize::new(0);
        let count = |shard: usize| {
            let selected = self.select(shard)?;
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, self.shards.all.len());
            }
            Ok((selected.len() as u64, digest_of(&selected)))
        };
        let counted = self.shards.side_by_side(|| (0..self.shards.all.len()).into_par_iter().map(count).collect())?;
        let counted = all_or_errors(counted)?;
        let (counts, selections) = counted.into_iter().unzip();
        self.selections = selections;
        Ok(counts)
    }

    /// Where indices are whose shard lies in a folder that cannot be written.
    pub(crate) fn cache_dir(&self) -> Option<&Path> {
        self.shards.places.elsewhere.as_deref()
    }

    /// Which samples are in the set.
    pub fn filter(&self) -> &SampleFilter {
        &self.filter
    }

    /// Which text of a sample is its caption.
    pub fn captions(&self) -> &CaptionRule {
        &self.captions
    }

    /// How many samples the filter lets through.
    pub fn passed(&self) -> Passed {
        Passed { passed: self.len(), of: self.shards.all.iter().map(|shard| shard.samples).sum() }
    }

    /// Number of samples with an image and a caption.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there is no sample; an open data set has at least one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shards, in the order of the patterns.
    pub fn shards(&self) -> &[Shard] {
        &self.shards.all
    }

    /// Samples in each shard that pass the filter: what the order law is made of.
    pub fn counts(&self) -> Vec<u64> {
        self.starts.windows(2).map(|ends| ends[1] - ends[0]).collect()
    }

    /// What the shards hold that cannot be used.
    pub fn problems(&self) -> &[Problem] {
        &self.shards.problems
    }

    /// A digest of names, sizes and indices of the shards, and of what a filter makes of them: the same shards in another
    /// folder have the same digest.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards.all {
            let line = format!("{}\0{}\0{}\n", shard.name(), shard.bytes, shard.index);
            hasher.update(line.as_bytes());
        }
        for (count, selection) in self.counts().iter().zip(&self.selections) {
            hasher.update(format!("{count}\0{selection}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Shard name and key of a sample.
    ///
    /// # Errors
    /// When there is no such sample, or its shard's index can no longer be read.
    pub fn key(&self, index: u64) -> Result<(String, String), DataError> {
        let (shard, at) = self.find(index).ok_or(DataError::OutOfRange { index, len: self.len() })?;
        let loaded = self.load(shard)?;
        let sample = loaded.sample(at).ok_or(DataError::OutOfRange { index, len: self.len() })?;
        Ok((self.shards.all[shard].name(), sample.key.clone()))
    }

    /// A sample's shard, and the sample's place in the shard's index; `None` where there is no such sample, or the index
    /// can no longer be read.
    pub fn place(&self, index: u64) -> Option<(&Shard, u64)> {
        let (shard, at) = self.find(index)?;
        if self.filter.is_open() {
            return Some((&self.shards.all[shard], at as u64));
        }
        let place = self.load(shard).ok()?.place(at)?;
        Some((&self.shards.all[shard], place as u64))
    }

    /// Reads a sample's image from its shard, and its caption, or the one of several that `pick` says.
    ///
    /// # Errors
    /// When the shard cannot be read any more, or the caption is not where it should be.
    pub fn read(&self, index: u64, pick: Pick) -> Result<RawSample, SampleError> {
        self.read_usable(index, pick, &|_| true)
    }

    /// As [`Dataset::read`]; of several captions one that is usable, where there is one.
    pub(crate) fn read_usable(&self, index: u64, pick: Pick, usable: Usable<'_>) -> Result<RawSample, SampleError> {
        self.look_at(index, |name, shard, sample| {
            let bytes = shard.captions(sample, &self.captions)?;
            let caption = self.captions.caption(&bytes.members(), pick, usable)?;
            let answers = self.captions.answers(&bytes.members())?;
            Ok(RawSample { shard: name, key: sample.key.clone(), image: shard.read(&sample.image)?, caption, answers })
        })
    }

    /// A sample's caption, the first of several, and what its image file's header says.
    pub(crate) fn header(&self, index: u64) -> Result<SampleHeader, SampleError> {
        self.look_at(index, |_, shard, sample| {
            let members = shard.captions(sample, &self.captions)?;
            let caption = self.captions.caption(&members.members(), Pick::First, &|_| true)?;
            let (format, width, height) = shard.inspect(&sample.image)?;
            Ok(SampleHeader { format, width, height, image_bytes: sample.image.bytes, caption })
        })
    }

    /// What `look` finds at a sample, given its shard's name, the shard and the sample's place in it.
    fn look_at<T>(
        &self,
        index: u64,
        look: impl FnOnce(String, &OpenShard, &IndexedSample) -> Result<T, SampleError>,
    ) -> Result<T, SampleError> {
        let (shard, at) = self.find(index).ok_or(SampleError::NoSuchSample(index))?;
        let cache =
            self.shards.remote().filter(|_| self.shards.all[shard].is_remote()).map(|remote| remote.capacity().0);
        let in_cache = |error: DataError| match cache {
            Some(dir) => error.in_shard_cache(dir),
            None => error,
        };
        let loaded = self.load(shard).map_err(|error| match in_cache(error) {
            error if error.is_of_this_machine() => SampleError::Machine(Box::new(error)),
            DataError::Remote { location, reason } => SampleError::ShardUnreadable(format!("{location}: {reason}")),
            error => SampleError::ShardChanged(error.to_string()),
        })?;
        let sample = loaded.sample(at).ok_or(SampleError::NoSuchSample(index))?;
        look(self.shards.all[shard].name(), &loaded.shard, sample).map_err(|error| match (error, cache) {
            (SampleError::Io(source), Some(dir)) => {
                SampleError::Machine(Box::new(DataError::ShardCache { dir: dir.to_owned(), source }))
            }
            (error, _) => error,
        })
    }

    /// The samples in stretches that can be read side by side: all of them, or, where shards have to be fetched, shard by
    /// shard while the next one is fetched, so that a small cache will do.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let count = if self.is_remote() { self.shards.all.len() } else { 1 };
        (0..count).map(move |shard| match self.is_remote() {
            false => 0..self.len(),
            true => {
                self.prefetch(&(shard..(shard + 2).min(count)).collect::<Vec<_>>());
                self.starts[shard]..self.starts[shard + 1]
            }
        })
    }

    /// What `error`, met at a sample, is where it says nothing of the sample: this machine, or the disk, is at fault.
    pub(crate) fn machine_fault(&self, index: u64, error: SampleError) -> Result<SampleError, DataError> {
        match error {
            SampleError::Machine(error) => Err(*error),
            // Less than there was: the shard is another by now.
            SampleError::Io(source) if source.kind() != io::ErrorKind::UnexpectedEof => {
                let shard = self.find(index).map(|(shard, _)| self.shards.all[shard].location.shown());
                Err(DataError::Io { path: shard.unwrap_or_default(), source })
            }
            error => Ok(error),
        }
    }

    /// Shard, and place in it, of a sample.
    fn find(&self, index: u64) -> Option<(usize, usize)> {
        if index >= self.len() {
            return None;
        }
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        Some((shard, (index - self.starts[shard]) as usize))
    }

    /// Shard and key of a sample as far as they can be had, for those who tell of it: of a shard that cannot be read the name at least.
    pub(crate) fn named(&self, index: u64) -> (String, String) {
        let shard = || self.find(index).map(|(shard, _)| self.shards.all[shard].name()).unwrap_or_default();
        self.key(index).unwrap_or_else(|_| (shard(), String::new()))
    }

    /// Begins to fetch shards that lie elsewhere, in this order, and keeps those that are there until the next call, or
    /// until somebody needs their room at once; others, if they lie elsewhere, are let go. It does not wait, and does
    /// nothing for shards of this machine.
    pub fn prefetch(&self, shards: &[usize]) {
        if let Some(remote) = self.shards.remote() {
            let keep: HashSet<usize> = shards.iter().copied().collect();
            self.loaded.retain(|shard| keep.contains(&shard) || !self.shards.all[shard].is_remote());
            let wanted = shards.iter().filter_map(|&shard| self.shards.all.get(shard));
            remote.prefetch(wanted.filter(|shard| shard.is_remote()).cloned().collect());
        }
    }

    /// As [`Dataset::prefetch`], for the shards of consecutive samples and the one behind them.
    pub(crate) fn prefetch_samples(&self, samples: Range<u64>) {
        if self.is_remote()
            && let Some((first, _)) = self.find(samples.start)
        {
            let end = self.starts.partition_point(|&start| start < samples.end);
            self.prefetch(&(first..=end.min(self.shards.all.len() - 1)).collect::<Vec<_>>());
        }
    }

    /// Whether some shards have to be fetched.
    pub fn is_remote(&self) -> bool {
        self.shards.remote().is_some()
    }

    /// Says that any `count` shards are read from in turn.
    pub(crate) fn keep_open(&self, count: usize) {
        self.loaded.keep_at_least(count);
    }

    /// Says that any `count` shards are in use at once.
    pub(crate) fn claim_cache(&self, count: usize) {
        if let Some(remote) = self.shards.remote() {
            let mut bytes: Vec<u64> = self.shards.all.iter().filter(|s| s.is_remote()).map(|s| s.bytes).collect();
            bytes.sort_unstable_by(|a, b| b.cmp(a));
            remote.claim(bytes.into_iter().take(count).fold(0, u64::saturating_add));
        }
    }

    /// Whether the shard cache can hold at once what the sets of this process claim, which `what` says the use of.
    ///
    /// # Errors
    /// When it cannot.
    pub(crate) fn check_cache(&self, what: &str) -> Result<(), DataError> {
        let Some(remote) = self.shards.remote() else { return Ok(()) };
        let (dir, max_bytes) = remote.capacity();
        let mut needed = remote.claim(0);
        // The threads of a reader that was dropped hold its set until they have done what they were at.
        let begun = Instant::now();
        while needed > max_bytes && begun.elapsed() < CLAIM_GRACE {
            thread::sleep(Duration::from_millis(20));
            needed = remote.claim(0);
        }
        match needed <= max_bytes {
            true => Ok(()),
            false => {
                Err(DataError::ShardCacheTooSmall { dir: dir.to_owned(), max_bytes, what: what.to_owned(), needed })
            }
        }
    }

    /// What the shard cache was good for; `None` where no shard has to be fetched.
    pub fn cache_use(&self) -> Option<CacheUse> {
        self.shards.remote().map(Remote::usage)
    }

    /// The shard's open file and index, from memory where it was used lately.
    fn load(&self, shard: usize) -> Result<Arc<Loaded>, DataError> {
        self.loaded.get(shard, || self.load_shard(shard))
    }

    fn load_shard(&self, number: usize) -> Result<Loaded, DataError> {
        let selected = match self.selections.get(number) {
            None => None,
            Some(counted) => {
                let selected = self.select(number)?;
                if digest_of(&selected) != *counted {
                    let reason = "its filter lets other samples pass than when the set was opened".to_owned();
                    return Err(DataError::ShardChanged { shard: self.shards.all[number].location.shown(), reason });
                }
                Some(selected)
            }
        };
        Ok(Loaded { shard: self.shards.load(number)?, selected })
    }

    /// The places in a shard's index of the samples that pass the filter. Where the numbers are kept, the shard itself is
    /// not read.
    fn select(&self, number: usize) -> Result<Vec<u32>, DataError> {
        let columns = self.filter.columns();
        // Before the shard is opened: what is read from a later one is measured again the next time.
        let version = self.shards.version(number)?;
        let (places, writable) = self.shards.attributes_places(number);
        let samples = self.shards.all[number].samples as usize;
        let file = AttributesFile { places, writable, shard: &version, samples };
        let measure = || {
            let measured = self.shards.load(number)?.measure(&columns, &self.captions);
            measured.map_err(DataError::io(self.shards.all[number].location.shown()))
        };
        Ok(self.filter.select(&file.get(&columns, &self.captions, measure)?, samples))
    }
}

impl Loaded {
    /// The place in the index of the `at`-th sample that passes the filter.
    fn place(&self, at: usize) -> Option<usize> {
        match &self.selected {
            Some(selected) => selected.get(at).map(|&place| place as usize),
            None => Some(at),
        }
    }

    /// The `at`-th sample that passes the filter.
    fn sample(&self, at: usize) -> Option<&IndexedSample> {
        self.shard.index.samples.get(self.place(at)?)
    }
}

impl OpenShard {
    pub(crate) fn read(&self, member: &Member) -> Result<Vec<u8>, SampleError> {
        let Member { bytes, extension, .. } = *member;
        if bytes > extension.max_bytes() {
            let (extension, max) = (extension.name(), extension.max_bytes());
            return Err(SampleError::MemberTooLarge { extension, bytes, max });
        }
        let mut bytes = vec![0; member.bytes as usize];
        self.file.read_exact_at(&mut bytes, member.offset)?;
        Ok(bytes)
    }

    /// The members that the rule needs.
    pub(crate) fn captions(&self, sample: &IndexedSample, rule: &CaptionRule) -> Result<CaptionBytes, SampleError> {
        let (text, json) = rule.needs(sample.text().is_some());
        let read = |member: Option<&Member>| member.map(|member| self.read(member)).transpose();
        Ok(CaptionBytes {
            text: read(sample.text().filter(|_| text))?,
            json: read(sample.metadata().filter(|_| json))?,
        })
    }
}

/// The members of one sample that hold its caption.
pub(crate) struct CaptionBytes {
    text: Option<Vec<u8>>,
    json: Option<Vec<u8>>,
}

impl CaptionBytes {
    pub(crate) fn members(&self) -> CaptionMembers<'_> {
        CaptionMembers { text: self.text.as_deref(), json: self.json.as_deref() }
    }
}

/// How many samples these are; `None` where they are too many to be counted.
pub(crate) fn sum(mut counts: impl Iterator<Item = u64>) -> Option<u64> {
    counts.try_fold(0u64, u64::checked_add)
}

fn digest_of(places: &[u32]) -> Digest {
    let bytes: Vec<u8> = places.iter().flat_map(|place| place.to_le_bytes()).collect();
    Digest::of(&bytes)
}

fn all_or_errors<T>(results: Vec<Result<T, DataError>>) -> Result<Vec<T>, DataError> {
    let (mut values, mut errors) = (Vec::with_capacity(results.len()), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(values) } else { Err(DataError::from_list(errors)) }
}

/// Builds the indices of the shards that `patterns` name anew, for shards that changed without a new length or time.
/// Every shard is read whole, so that its digest stands in the index; of a shard that lies elsewhere an index that lies
/// beside it and fits is believed.
///
/// # Errors
/// As [`Dataset::open`], without the demand for a sample; and for manifests, which only repeat what was found once.
pub fn reindex(patterns: &[String], options: &OpenOptions) -> Result<Vec<Shard>, DataError> {
    Ok(Shards::open(patterns, options, Indices::Rebuild)?.all)
}

/// The same without belief in any index: shards that lie elsewhere are fetched and read too, as after one was exchanged and the index beside it
/// was not.
///
/// # Errors
/// As [`reindex`].
pub fn rescan(patterns: &[String], options: &OpenOptions) -> Result<Vec<Shard>, DataError> {
    Ok(Shards::open(patterns, options, Indices::Rescan)?.all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{open, shards};

    #[test]
    fn what_the_disk_does_is_no_samples_fault() {
        let folder = shards(&[2], |_| false);
        let set = open(folder.path());
        let of = |error: io::Error| set.machine_fault(1, error.into());
        // EIO.
        let error = of(io::Error::from_raw_os_error(5)).unwrap_err();
        assert!(error.to_string().contains("00.tar: "), "{error}");
        assert!(of(io::ErrorKind::UnexpectedEof.into()).is_ok());
        assert!(set.machine_fault(1, SampleError::CaptionEmpty).is_ok());
        let full = DataError::io("/cache")(io::Error::from_raw_os_error(28));
        assert!(set.machine_fault(1, SampleError::Machine(Box::new(full))).is_err());
    }
}
