//! Image features of a batch: computed by the frozen encoder, or kept in memory or on disk after the first time.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use blip2_data::{BadSamples, Clean, Corpus, EvalOptions, EvalReader, HostBatch, Quarantined, TextEncoder};
use tch::{Kind, Tensor, no_grad};

use crate::disk_features::DiskFeatures;
use crate::encoder::ImageEncoder;
use crate::error::Error;

/// Images encoded at once when a cache is filled ahead of training.
pub(crate) const ENCODE_BATCH: usize = 32;

/// Where features come from.
pub(crate) enum Features {
    /// From the batch's pixels.
    Encode,
    /// From memory, by the sample's index.
    Memory(Rc<MemoryCache>),
    /// From a store on disk, and from the pixels of what is not there yet.
    Disk(DiskFeatures),
}

impl Features {
    /// Features of a batch, on the encoder's device, `[B, N, width]`.
    ///
    /// # Errors
    /// When the device refuses, or the batch lacks what is needed.
    pub fn of(&self, batch: &HostBatch, encoder: &ImageEncoder) -> Result<Tensor, Error> {
        match self {
            Features::Encode => encode(batch, encoder),
            Features::Memory(cache) => Ok(cache.rows(&batch.sample_index)?.to_device(encoder.device())),
            Features::Disk(features) => features.of(batch, encoder),
        }
    }

    /// A dtype that holds the features exactly.
    pub fn kind(&self, encoder: &ImageEncoder) -> Kind {
        match self {
            Features::Encode => encoder.kind(),
            Features::Memory(_) => Kind::BFloat16,
            Features::Disk(disk) => disk.numbers().kind(),
        }
    }

    /// Whether the loader has to decode images.
    pub fn needs_pixels(&self) -> bool {
        !matches!(self, Features::Memory(_))
    }

    /// What could not be read when memory was filled.
    pub fn quarantined(&self) -> &[Quarantined] {
        match self {
            Features::Memory(cache) => &cache.quarantined,
            Features::Encode | Features::Disk(_) => &[],
        }
    }

    /// The same, as what a reader leaves out.
    pub fn bad(&self) -> BadSamples {
        let mut bad = BadSamples::default();
        self.quarantined().iter().for_each(|sample| bad.insert(sample.index, 0));
        bad
    }

    /// The store on disk, where there is one.
    pub fn disk(&self) -> Option<&DiskFeatures> {
        match self {
            Features::Disk(disk) => Some(disk),
            Features::Encode | Features::Memory(_) => None,
        }
    }
}

fn encode(batch: &HostBatch, encoder: &ImageEncoder) -> Result<Tensor, Error> {
    let pixels = batch.pixels.as_deref().ok_or_else(|| Error::Mismatch("a batch without pixels".into()))?;
    encoder.features(pixels, batch.size, batch.image_size)
}

/// Features of every sample of a set under the evaluation transform, in bf16 on the host.
pub struct MemoryCache {
    /// `[samples that could be read, N, width]`
    features: Tensor,
    rows: BTreeMap<u64, i64>,
    /// Samples whose image could not be read.
    quarantined: Vec<Quarantined>,
}

/// The memory caches of one command, by what they hold: stage 2 starts from stage 1's.
#[derive(Default)]
pub struct MemoryCaches {
    filled: BTreeMap<String, Rc<MemoryCache>>,
}

impl MemoryCaches {
    /// The cache of this set as `encoder` sees it, filled where it is not there yet.
    ///
    /// # Errors
    /// As [`MemoryCache::fill`].
    pub fn get_or_fill(
        &mut self,
        corpus: &Arc<Corpus>,
        text: &Arc<TextEncoder>,
        encoder: &ImageEncoder,
        options: &FillOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Rc<MemoryCache>, Error> {
        let (seen, clean) = (encoder.preprocessing(), options.clean);
        let key = format!("{} {} {seen:?} {clean:?}", encoder.identity(), corpus.identity());
        if let Some(cache) = self.filled.get(&key) {
            return Ok(cache.clone());
        }
        let cache = Rc::new(MemoryCache::fill(corpus, text, encoder, options, progress)?);
        self.filled.insert(key, cache.clone());
        Ok(cache)
    }
}

/// How a cache is filled.
pub struct FillOptions {
    /// Decoding threads.
    pub threads: usize,
    /// How captions are cleaned; an empty caption makes a sample unusable.
    pub clean: Clean,
}

impl MemoryCache {
    /// Encodes the whole set once. `progress` hears of `(done, all)`.
    ///
    /// # Errors
    /// When the set cannot be read or holds no usable image.
    pub fn fill(
        corpus: &Arc<Corpus>,
        text: &Arc<TextEncoder>,
        encoder: &ImageEncoder,
        options: &FillOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<MemoryCache, Error> {
        let all = corpus.len();
        let mut reader = EvalReader::new(
            corpus.clone(),
            text.clone(),
            EvalOptions {
                range: 0..all,
                batch: ENCODE_BATCH,
                threads: options.threads,
                prefetch: 2,
                image_size: encoder.preprocessing().size,
                filter: encoder.preprocessing().filter,
                pixels: true,
                clean: options.clean,
                pad_id: 0,
                pad_to_multiple: 1,
                bad: BadSamples::default(),
            },
        )?;
        let (mut store, mut rows, mut done): (Option<Tensor>, _, i64) = (None, BTreeMap::new(), 0);
        for batch in reader.by_ref() {
            let batch = batch?;
            let features = encode(&batch, encoder)?;
            let shape = features.size();
            // One allocation of the whole set: stacking pieces at the end would need it twice.
            let store = store.get_or_insert_with(|| {
                Tensor::empty([all as i64, shape[1], shape[2]], (Kind::BFloat16, tch::Device::Cpu))
            });
            no_grad(|| store.narrow(0, done, batch.size as i64).copy_(&features));
            rows.extend(batch.sample_index.iter().copied().zip(done..));
            done += batch.size as i64;
            progress(batch.sample_index.last().map_or(0, |i| i + 1), all);
        }
        let quarantined = reader.take_quarantined();
        let store = store.ok_or_else(|| {
            let first = quarantined.first().map(ToString::to_string).unwrap_or_default();
            Error::Mismatch(format!("none of the {all} samples of the set can be read; the first: {first}"))
        })?;
        Ok(MemoryCache { features: store.narrow(0, 0, done), rows, quarantined })
    }

    /// Features of samples by index, `f32 [B, N, width]`.
    fn rows(&self, indices: &[u64]) -> Result<Tensor, Error> {
        let rows: Option<Vec<i64>> = indices.iter().map(|i| self.rows.get(i).copied()).collect();
        let rows = rows.ok_or_else(|| Error::Mismatch("a sample without cached features".into()))?;
        Ok(self.features.index_select(0, &Tensor::from_slice(&rows)).to_kind(Kind::Float))
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> u64 {
        self.features.numel() as u64 * 2
    }
}
