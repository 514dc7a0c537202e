//! One split of image-text pairs: its shards, their sample counts, and any sample by its index.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::index::{Extension, Index, IndexedShard, Member};
use crate::patterns::expand;
use crate::scan::Problem;
use crate::{DataError, SampleError};

/// How a data set is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// Where relative patterns start.
    pub base_dir: PathBuf,
    /// Where indices go whose shard lies in a folder that cannot be written.
    pub cache_dir: Option<PathBuf>,
    /// The field of a `.json` member that holds the caption.
    pub caption_field: String,
    /// Called after each shard with the number of shards done and of all.
    pub progress: Option<Arc<dyn Fn(usize, usize) + Send + Sync>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { base_dir: PathBuf::from("."), cache_dir: None, caption_field: "caption".to_owned(), progress: None }
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
    /// Index of the first sample of each shard, and the number of all.
    starts: Vec<u64>,
    problems: Vec<Problem>,
    caption_field: String,
    loaded: Mutex<VecDeque<Slot>>,
}

/// A shard in use.
struct Loaded {
    file: File,
    index: Index,
}

struct Slot {
    shard: usize,
    /// Filled by the first who needs it, without holding up those who need other shards.
    loaded: Arc<Mutex<Option<Arc<Loaded>>>>,
}

/// The longest image or caption that is read.
pub(crate) const MAX_MEMBER_BYTES: u64 = 1 << 29;

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
        let (mut shards, mut problems, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        for result in opened {
            match result {
                Ok((shard, found)) => {
                    shards.push(shard);
                    problems.extend(found);
                }
                Err(error) => errors.push(error),
            }
        }
        if !errors.is_empty() {
            return Err(DataError::from_list(errors));
        }
        let mut starts = vec![0];
        let mut samples = 0;
        for shard in &shards {
            samples += shard.header.samples;
            starts.push(samples);
        }
        if samples == 0 {
            return Err(DataError::NoSamples {
                shards: shards.len(),
                problems: problems.len(),
                first: problems.first().map_or("none".to_owned(), ToString::to_string),
            });
        }
        Ok(Dataset {
            shards,
            starts,
            problems,
            caption_field: options.caption_field.clone(),
            loaded: Mutex::new(VecDeque::new()),
        })
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

    /// Samples in each shard: what [`crate::Order`] is made of.
    pub fn counts(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.header.samples).collect()
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
        Ok((self.shards[shard].name(), loaded.index.samples[at].key.clone()))
    }

    /// Reads a sample's image and caption from its shard.
    ///
    /// # Errors
    /// When the shard cannot be read any more, or the caption is not text.
    pub fn read(&self, index: u64) -> Result<RawSample, SampleError> {
        let (shard, at) = self.find(index).ok_or(SampleError::NoSuchSample(index))?;
        let loaded = self.load(shard).map_err(|error| SampleError::ShardChanged(error.to_string()))?;
        let sample = &loaded.index.samples[at];
        let read = |member: &Member| {
            if member.bytes > MAX_MEMBER_BYTES {
                return Err(SampleError::MemberTooLarge { bytes: member.bytes });
            }
            let mut bytes = vec![0; member.bytes as usize];
            loaded.file.read_exact_at(&mut bytes, member.offset)?;
            Ok(bytes)
        };
        Ok(RawSample {
            shard: self.shards[shard].name(),
            key: sample.key.clone(),
            image: read(&sample.image)?,
            caption: self.caption(read(&sample.caption)?, sample.caption.extension)?,
        })
    }

    fn caption(&self, bytes: Vec<u8>, extension: Extension) -> Result<String, SampleError> {
        let text =
            String::from_utf8(bytes).map_err(|error| SampleError::CaptionNotUtf8(error.utf8_error().valid_up_to()))?;
        if extension != Extension::Json {
            return Ok(text);
        }
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| SampleError::CaptionNotJson(error.to_string()))?;
        let caption = value.get(&self.caption_field).and_then(serde_json::Value::as_str);
        caption.map(str::to_owned).ok_or_else(|| SampleError::CaptionField(self.caption_field.clone()))
    }

    /// The shard of a sample, and its number in it.
    pub fn place(&self, index: u64) -> Option<(&IndexedShard, u64)> {
        self.find(index).map(|(shard, at)| (&self.shards[shard], at as u64))
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
        let fresh = Arc::new(Loaded::new(&self.shards[shard])?);
        *loaded = Some(Arc::clone(&fresh));
        Ok(fresh)
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
        Ok(Loaded { file, index })
    }
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
    let (mut shards, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(shard) => shards.push(shard),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(shards) } else { Err(DataError::from_list(errors)) }
}
