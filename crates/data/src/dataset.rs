//! One split of image-text pairs: its shards, their sample counts, and any sample by its index.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::index::{Extension, Member};
use crate::scan::Problem;
use crate::shard::{Indices, OpenShard, Shard, Shards};
use crate::{DataError, RemoteOptions, SampleError};

/// How a data set is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// Where relative patterns start.
    pub base_dir: PathBuf,
    /// Where indices go whose shard lies in a folder that cannot be written.
    pub cache_dir: Option<PathBuf>,
    /// The field of a `.json` member that holds the caption.
    pub caption_field: String,
    /// How shards are fetched and kept that lie elsewhere.
    pub remote: RemoteOptions,
    /// Called after each shard with the number of shards done and of all.
    pub progress: Option<Arc<dyn Fn(usize, usize) + Send + Sync>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            base_dir: PathBuf::from("."),
            cache_dir: None,
            caption_field: "caption".to_owned(),
            remote: RemoteOptions::default(),
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
    shards: Shards,
    /// Index of the first sample of each shard, and the number of all.
    starts: Vec<u64>,
    caption_field: String,
    loaded: Mutex<VecDeque<Slot>>,
}

struct Slot {
    shard: usize,
    /// Filled by the first who needs it, without holding up those who need other shards.
    loaded: Arc<Mutex<Option<Arc<OpenShard>>>>,
}

/// The longest image or caption that is read.
pub(crate) const MAX_MEMBER_BYTES: u64 = 1 << 29;

/// Enough for eight lanes with windows of eight shards.
const KEEP_LOADED: usize = 64;

impl Dataset {
    /// Opens the shards that `patterns` name: files, globs, URLs or manifests. Indices that are missing or stale are
    /// built; of shards that lie elsewhere a manifest is kept in the shard cache, from which they open the next time.
    ///
    /// # Errors
    /// All at once: patterns and files that are wrong, shards that are no tar files; or that there is no usable sample.
    pub fn open(patterns: &[String], options: &OpenOptions) -> Result<Dataset, DataError> {
        let shards = Shards::open(patterns, options, Indices::Keep)?;
        let mut starts = vec![0];
        let mut samples = 0;
        for shard in &shards.all {
            samples += shard.samples;
            starts.push(samples);
        }
        if samples == 0 {
            return Err(DataError::NoSamples {
                shards: shards.all.len(),
                problems: shards.problems.len(),
                first: shards.problems.first().map_or("none".to_owned(), ToString::to_string),
            });
        }
        let (caption_field, loaded) = (options.caption_field.clone(), Mutex::new(VecDeque::new()));
        Ok(Dataset { shards, starts, caption_field, loaded })
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

    /// Samples in each shard: what [`crate::Order`] is made of.
    pub fn counts(&self) -> Vec<u64> {
        self.shards.all.iter().map(|shard| shard.samples).collect()
    }

    /// What the shards hold that cannot be used.
    pub fn problems(&self) -> &[Problem] {
        &self.shards.problems
    }

    /// A digest of names, sizes and indices of the shards: the same shards in another folder have the same digest.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards.all {
            let line = format!("{}\0{}\0{}\n", shard.name(), shard.bytes, shard.index);
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
        Ok((self.shards.all[shard].name(), loaded.index.samples[at].key.clone()))
    }

    /// Reads a sample's image and caption from its shard.
    ///
    /// # Errors
    /// When the shard cannot be read any more, or the caption is not text.
    pub fn read(&self, index: u64) -> Result<RawSample, SampleError> {
        let (shard, at) = self.find(index).ok_or(SampleError::NoSuchSample(index))?;
        let loaded = self.load(shard).map_err(|error| match error {
            DataError::Remote { location, reason } => SampleError::ShardUnreadable(format!("{location}: {reason}")),
            error => SampleError::ShardChanged(error.to_string()),
        })?;
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
            shard: self.shards.all[shard].name(),
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

    /// Shard, and place in it, of a sample.
    fn find(&self, index: u64) -> Option<(usize, usize)> {
        if index >= self.len() {
            return None;
        }
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        Some((shard, (index - self.starts[shard]) as usize))
    }

    /// File name of a sample's shard.
    pub(crate) fn shard_name(&self, index: u64) -> Option<String> {
        self.find(index).map(|(shard, _)| self.shards.all[shard].name())
    }

    /// Begins to fetch shards that lie elsewhere, in this order, and keeps those that are there until the next call.
    /// It does not wait, and does nothing for shards of this machine.
    pub fn prefetch(&self, shards: &[usize]) {
        if let Some(remote) = self.shards.remote() {
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

    /// Whether the shard cache can hold any `count` shards at once, which `what` says the use of.
    ///
    /// # Errors
    /// When it cannot.
    pub(crate) fn check_cache(&self, count: usize, what: String) -> Result<(), DataError> {
        let Some(remote) = self.shards.remote() else { return Ok(()) };
        let mut bytes: Vec<u64> = self.shards.all.iter().filter(|s| s.is_remote()).map(|s| s.bytes).collect();
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        let needed = bytes.iter().take(count).sum();
        let (dir, max_bytes) = remote.capacity();
        match needed <= max_bytes {
            true => Ok(()),
            false => Err(DataError::ShardCacheTooSmall { dir: dir.to_owned(), max_bytes, what, needed }),
        }
    }

    /// The shard's open file and index, from memory where it was used lately.
    fn load(&self, shard: usize) -> Result<Arc<OpenShard>, DataError> {
        let slot = {
            let mut slots = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = match slots.iter().position(|slot| slot.shard == shard) {
                Some(place) => slots.remove(place),
                None => None,
            };
            let slot = slot.unwrap_or_else(|| Slot { shard, loaded: Arc::default() });
            let loaded = Arc::clone(&slot.loaded);
            slots.push_back(slot);
            self.close_some(&mut slots);
            loaded
        };
        let mut loaded = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &*loaded {
            return Ok(Arc::clone(loaded));
        }
        let fresh = Arc::new(self.shards.load(shard)?);
        *loaded = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// Closes the shards that were used longest ago: an open one stays in the shard cache, which has its limit.
    fn close_some(&self, slots: &mut VecDeque<Slot>) {
        let capacity = self.shards.remote().map_or(u64::MAX, |remote| remote.capacity().1);
        let cached = |slot: &Slot| match &self.shards.all[slot.shard] {
            shard if shard.is_remote() => shard.bytes,
            _ => 0,
        };
        let mut used: u64 = slots.iter().map(cached).sum();
        while slots.len() > 1 && (slots.len() > KEEP_LOADED || used > capacity) {
            used -= slots.pop_front().as_ref().map_or(0, cached);
        }
    }
}

/// Builds the indices of the shards that `patterns` name anew, for shards that changed without a new length or time.
/// Every shard is read whole, so that its digest stands in the index; of a shard that lies elsewhere an index that lies
/// beside it and fits is believed.
///
/// # Errors
/// As [`Dataset::open`], without the demand for a sample.
pub fn reindex(patterns: &[String], options: &OpenOptions) -> Result<Vec<Shard>, DataError> {
    Ok(Shards::open(patterns, options, Indices::Rebuild)?.all)
}
