//! One split of image-text pairs: its shards, their sample counts, and any sample by its index.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::attributes::{AttributesFile, Column, Measured};
use crate::caption::{self, CaptionMembers, CaptionRule, Pick};
use crate::filter::{Passed, SampleFilter};
use crate::image::inspect;
use crate::index::{Index, IndexedSample, IndexedShard, Member};
use crate::patterns::expand;
use crate::sample::guarded;
use crate::scan::Problem;
use crate::{DataError, SampleError};

/// How a data set is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// Where relative patterns start.
    pub base_dir: PathBuf,
    /// Where indices go whose shard lies in a folder that cannot be written.
    pub cache_dir: Option<PathBuf>,
    /// Which text of a sample is its caption.
    pub captions: CaptionRule,
    /// Which samples are in the set.
    pub filter: SampleFilter,
    /// Called after each shard with the number of shards done and of all.
    pub progress: Option<Arc<dyn Fn(usize, usize) + Send + Sync>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            base_dir: PathBuf::from("."),
            cache_dir: None,
            captions: CaptionRule::default(),
            filter: SampleFilter::default(),
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
}

/// All shards of one split. Their sample counts stay in memory; their indices come and go.
pub struct Dataset {
    shards: Vec<IndexedShard>,
    /// Index of the first sample of each shard, and the number of all: those that pass the filter.
    starts: Vec<u64>,
    problems: Vec<Problem>,
    captions: CaptionRule,
    filter: SampleFilter,
    cache_dir: Option<PathBuf>,
    loaded: Mutex<VecDeque<Slot>>,
}

/// A shard in use.
struct Loaded {
    file: File,
    index: Index,
    /// Places in the index of the samples that pass the filter; `None`: of all.
    selected: Option<Vec<u32>>,
}

struct Slot {
    shard: usize,
    /// Filled by the first who needs it, without holding up those who need other shards.
    loaded: Arc<Mutex<Option<Arc<Loaded>>>>,
}

/// The longest image or caption that is read.
pub(crate) const MAX_MEMBER_BYTES: u64 = 1 << 29;

/// Where nearly every image file has its width and height.
const IMAGE_HEAD_BYTES: u64 = 1 << 16;

/// Enough for eight lanes with windows of eight shards.
const KEEP_LOADED: usize = 64;

impl Dataset {
    /// Opens the shards that `patterns` name; indices that are missing or stale are built.
    ///
    /// # Errors
    /// All at once: patterns and files that are wrong, shards that are no tar files; or that there is no usable sample.
    pub fn open(patterns: &[String], options: &OpenOptions) -> Result<Dataset, DataError> {
        let paths = expand(patterns, &options.base_dir)?;
        let done = AtomicUsize::new(0);
        let opened: Vec<_> = paths
            .par_iter()
            .map(|path| {
                let shard = IndexedShard::open(path, options.cache_dir.as_deref())?;
                let problems = match shard.header.problems {
                    0 => Vec::new(),
                    _ => shard.load()?.problems,
                };
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                if let Some(progress) = &options.progress {
                    progress(done, paths.len());
                }
                Ok((shard, problems))
            })
            .collect();
        let (shards, problems): (Vec<_>, Vec<_>) = all_or_errors(opened)?.into_iter().unzip();
        let problems: Vec<Problem> = problems.into_iter().flatten().collect();
        let indexed: u64 = shards.iter().map(|shard| shard.header.samples).sum();
        if indexed == 0 {
            return Err(DataError::NoSamples {
                shards: shards.len(),
                problems: problems.len(),
                first: problems.first().map_or("none".to_owned(), ToString::to_string),
            });
        }
        let mut dataset = Dataset {
            shards,
            starts: Vec::new(),
            problems,
            captions: options.captions.clone(),
            filter: options.filter.clone(),
            cache_dir: options.cache_dir.clone(),
            loaded: Mutex::new(VecDeque::new()),
        };
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
    fn count(&self, options: &OpenOptions) -> Result<Vec<u64>, DataError> {
        if self.filter.is_open() {
            return Ok(self.shards.iter().map(|shard| shard.header.samples).collect());
        }
        let done = AtomicUsize::new(0);
        let count = |shard: &IndexedShard| {
            let loaded = self.load_shard(shard)?;
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, self.shards.len());
            }
            Ok(loaded.len() as u64)
        };
        all_or_errors(self.shards.par_iter().map(count).collect())
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
        Passed { passed: self.len(), of: self.shards.iter().map(|shard| shard.header.samples).sum() }
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
    pub fn shards(&self) -> &[IndexedShard] {
        &self.shards
    }

    /// Samples in each shard that pass the filter: what the order law is made of.
    pub fn counts(&self) -> Vec<u64> {
        self.starts.windows(2).map(|ends| ends[1] - ends[0]).collect()
    }

    /// What the shards hold that cannot be used.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// A digest of names, sizes and indices of the shards: the same shards in another folder have the same digest.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards {
            let line = format!("{}\0{}\0{}\n", shard.name(), shard.header.tar_bytes, shard.header.digest);
            hasher.update(line.as_bytes());
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
        Ok((self.shards[shard].name(), loaded.sample(at).key.clone()))
    }

    /// A sample's shard, and the sample's place in the shard's index; `None` where there is no such sample, or the index
    /// can no longer be read.
    pub fn place(&self, index: u64) -> Option<(&IndexedShard, u64)> {
        let (shard, at) = self.find(index)?;
        if self.filter.is_open() {
            return Some((&self.shards[shard], at as u64));
        }
        let loaded = self.load(shard).ok()?;
        let place = loaded.selected.as_ref().map_or(at, |selected| selected[at] as usize);
        Some((&self.shards[shard], place as u64))
    }

    /// Reads a sample's image from its shard, and its caption, or the one of several that `pick` says.
    ///
    /// # Errors
    /// When the shard cannot be read any more, or the caption is not where it should be.
    pub fn read(&self, index: u64, pick: Pick) -> Result<RawSample, SampleError> {
        let (shard, at) = self.find(index).ok_or(SampleError::NoSuchSample(index))?;
        let loaded = self.load(shard).map_err(|error| SampleError::ShardChanged(error.to_string()))?;
        let sample = loaded.sample(at);
        let caption = self.captions.caption(&loaded.captions(sample, &self.captions)?.members(), pick)?;
        let image = loaded.read(&sample.image)?;
        Ok(RawSample { shard: self.shards[shard].name(), key: sample.key.clone(), image, caption })
    }

    /// Shard, and place in it, of a sample.
    fn find(&self, index: u64) -> Option<(usize, usize)> {
        if index >= self.len() {
            return None;
        }
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        Some((shard, (index - self.starts[shard]) as usize))
    }

    /// The shard's open file and index, from memory where it was used lately.
    fn load(&self, shard: usize) -> Result<Arc<Loaded>, DataError> {
        let slot = {
            let mut slots = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = match slots.iter().position(|slot| slot.shard == shard) {
                Some(place) => slots.remove(place),
                None => None,
            };
            let slot = slot.unwrap_or_else(|| Slot { shard, loaded: Arc::default() });
            let loaded = Arc::clone(&slot.loaded);
            slots.push_back(slot);
            if slots.len() > KEEP_LOADED {
                slots.pop_front();
            }
            loaded
        };
        let mut loaded = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &*loaded {
            return Ok(Arc::clone(loaded));
        }
        let fresh = Arc::new(self.load_shard(&self.shards[shard])?);
        *loaded = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    fn load_shard(&self, shard: &IndexedShard) -> Result<Loaded, DataError> {
        let mut loaded = Loaded::new(shard)?;
        let columns = self.filter.columns();
        if !columns.is_empty() {
            let samples = loaded.index.samples.len();
            let places = shard.attributes_places(self.cache_dir.as_deref());
            let file = AttributesFile { places, index: &shard.header.digest, samples };
            let attributes = file.get(&columns, &self.captions, || Ok(loaded.measure(&columns, &self.captions)))?;
            loaded.selected = Some(self.filter.select(&attributes, samples));
        }
        Ok(loaded)
    }
}

impl Loaded {
    fn new(shard: &IndexedShard) -> Result<Loaded, DataError> {
        let file = File::open(&shard.path).map_err(DataError::io(&shard.path))?;
        let bytes = file.metadata().map_err(DataError::io(&shard.path))?.len();
        if bytes != shard.header.tar_bytes {
            return Err(DataError::BadIndex {
                shard: shard.path.clone(),
                reason: format!("the shard has {bytes} bytes, it was indexed with {}", shard.header.tar_bytes),
            });
        }
        let index = shard.load()?;
        Ok(Loaded { file, index, selected: None })
    }

    /// Samples that pass the filter.
    fn len(&self) -> usize {
        self.selected.as_ref().map_or(self.index.samples.len(), Vec::len)
    }

    /// The `at`-th sample that passes the filter.
    fn sample(&self, at: usize) -> &IndexedSample {
        let place = self.selected.as_ref().map_or(at, |selected| selected[at] as usize);
        &self.index.samples[place]
    }

    fn read(&self, member: &Member) -> Result<Vec<u8>, SampleError> {
        if member.bytes > MAX_MEMBER_BYTES {
            return Err(SampleError::MemberTooLarge { bytes: member.bytes });
        }
        let mut bytes = vec![0; member.bytes as usize];
        self.file.read_exact_at(&mut bytes, member.offset)?;
        Ok(bytes)
    }

    /// The members that the rule needs.
    fn captions(&self, sample: &IndexedSample, rule: &CaptionRule) -> Result<CaptionBytes, SampleError> {
        let (text, json) = rule.needs(sample.text().is_some());
        let read = |member: Option<&Member>| member.map(|member| self.read(member)).transpose();
        Ok(CaptionBytes {
            text: read(sample.text().filter(|_| text))?,
            json: read(sample.metadata().filter(|_| json))?,
        })
    }

    /// What filters ask of every sample of the shard; what cannot be read has no value.
    fn measure(&self, columns: &[Column], rule: &CaptionRule) -> Vec<Measured> {
        let wants = |wanted: fn(&Column) -> bool| columns.iter().any(wanted);
        let sides = wants(|column| matches!(column, Column::Width | Column::Height));
        let words = wants(|column| matches!(column, Column::CaptionWords));
        let json = wants(|column| matches!(column, Column::Json(_)));
        let words_of = |sample: &IndexedSample| {
            let rule = CaptionRule { template: None, ..rule.clone() };
            let caption = rule.caption(&self.captions(sample, &rule)?.members(), Pick::First)?;
            Ok::<_, SampleError>(caption.split_whitespace().count())
        };
        let measure = |sample: &IndexedSample| Measured {
            sides: sides.then(|| guarded(|| self.sides(&sample.image)).ok()).flatten(),
            caption_words: words.then(|| words_of(sample).ok()).flatten(),
            json: sample.metadata().filter(|_| json).and_then(|member| caption::parse(&self.read(member).ok()?).ok()),
        };
        self.index.samples.par_iter().map(measure).collect()
    }

    /// Width and height, mostly from the file's first bytes.
    fn sides(&self, image: &Member) -> Result<(usize, usize), SampleError> {
        let head = self.read(&Member { bytes: image.bytes.min(IMAGE_HEAD_BYTES), ..*image })?;
        let (_, width, height) = match inspect(&head) {
            Err(_) if image.bytes > IMAGE_HEAD_BYTES => inspect(&self.read(image)?)?,
            inspected => inspected?,
        };
        Ok((width, height))
    }
}

/// The members of one sample that hold its caption.
struct CaptionBytes {
    text: Option<Vec<u8>>,
    json: Option<Vec<u8>>,
}

impl CaptionBytes {
    fn members(&self) -> CaptionMembers<'_> {
        CaptionMembers { text: self.text.as_deref(), json: self.json.as_deref() }
    }
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
///
/// # Errors
/// As [`Dataset::open`], without the demand for a sample.
pub fn reindex(patterns: &[String], options: &OpenOptions) -> Result<Vec<IndexedShard>, DataError> {
    let paths = expand(patterns, &options.base_dir)?;
    let done = AtomicUsize::new(0);
    let results: Vec<Result<IndexedShard, DataError>> = paths
        .par_iter()
        .map(|path| {
            let shard = IndexedShard::rebuild(path, options.cache_dir.as_deref());
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, paths.len());
            }
            shard
        })
        .collect();
    all_or_errors(results)
}
