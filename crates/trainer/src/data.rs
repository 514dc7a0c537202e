//! The training data of a run: the data set, its loader from any stream position, and micro-batches of features.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use blip2_data::{
    Augment, BadSamples, Clean, Dataset, HostBatch, Loader, LoaderOptions, OpenOptions, Problem, Quarantined,
    RemoteOptions, ShardCache,
};

use crate::batch::{Batch, Share};
use crate::config::{self, AutoOr, Config, FeatureCache, ShardCacheConfig};
use crate::encoder::ImageEncoder;
use crate::error::Error;
use crate::features::{Features, FillOptions, MemoryCache, MemoryCaches};
use crate::framed::FramedBatch;
use crate::task::TargetRule;
use crate::text::TextFrame;

/// Texts are padded to multiples of this on CUDA, where kernels like it.
const CUDA_TEXT_MULTIPLE: usize = 8;

/// The training set of a run.
pub struct TrainData {
    dataset: Arc<Dataset>,
    cache: Option<Rc<MemoryCache>>,
    text: TextFrame,
    options: LoaderOptions,
    micro_batch: usize,
    rule: TargetRule,
}

impl TrainData {
    /// Opens the set that `config` names and fills its memory cache where the run has one; `progress` hears of `(done, all)` images.
    ///
    /// # Errors
    /// When the shards cannot be read, or more images than allowed cannot be used.
    pub fn open(
        config: &Config,
        encoder: &ImageEncoder,
        text: &TextFrame,
        rule: TargetRule,
        caches: &mut MemoryCaches,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<TrainData, Error> {
        let [set] = config.data.train.as_slice() else {
            return Err(Error::Mismatch(format!(
                "data.train: expected one set, got {}; mixtures of sets are not supported yet: put their shards into one pattern",
                config.data.train.len()
            )));
        };
        let dataset = Dataset::open(std::slice::from_ref(&set.shards), &open_options(config));
        let dataset = Arc::new(dataset.map_err(|source| Error::DataSet { key: "data.train", source })?);
        let loader = &config.data.loader;
        let threads = threads(&loader.threads);
        let clean = clean(config.data.text.clean);
        let cache = match &config.data.feature_cache {
            FeatureCache::Off => None,
            FeatureCache::Memory => {
                let options = FillOptions { threads, clean };
                Some(caches.get_or_fill(&dataset, &text.encoder, encoder, &options, progress)?)
            }
            FeatureCache::Directory(folder) => {
                return Err(Error::Mismatch(format!(
                    "data.feature_cache: expected off or memory, got the folder {}; a cache on disk is not supported yet",
                    folder.display()
                )));
            }
        };
        let cuda = matches!(encoder.device(), tch::Device::Cuda(_));
        let bad = cache.as_deref().map(MemoryCache::bad).unwrap_or_default();
        if bad.len() as f64 > loader.max_bad_fraction * dataset.len() as f64 {
            return Err(Error::Mismatch(format!(
                "data.train: {} of {} images cannot be used, more than data.loader.max_bad_fraction ({}); the first: {}",
                bad.len(),
                dataset.len(),
                loader.max_bad_fraction,
                cache.iter().flat_map(|c| &c.quarantined).next().map(Quarantined::to_string).unwrap_or_default()
            )));
        }
        let options = LoaderOptions {
            seed: config.run.seed,
            global_batch: config.schedule.global_batch,
            rank: 0,
            world: 1,
            start: 0,
            end: None,
            threads,
            prefetch: loader.prefetch,
            augment: augment(config.data.image.augment),
            image_size: encoder.preprocessing().size,
            filter: encoder.preprocessing().filter,
            pixels: cache.is_none(),
            clean,
            lanes: config.data.lanes,
            window_shards: loader.window_shards,
            max_bad_fraction: loader.max_bad_fraction,
            pad_id: text.pad_id,
            pad_to_multiple: if cuda { CUDA_TEXT_MULTIPLE } else { 1 },
            bad,
        };
        let micro_batch = config.micro_batch();
        Ok(TrainData { dataset, cache, text: text.clone(), options, micro_batch, rule })
    }

    /// The stream from a position on. `bad` is a checkpoint's list, to which what the cache could not read is added.
    ///
    /// # Errors
    /// When the options contradict the data.
    pub fn loader(&self, start: u64, bad: &BadSamples) -> Result<Loader, Error> {
        let mut options = LoaderOptions { start, ..self.options.clone() };
        options.bad.merge(bad);
        Ok(Loader::new(self.dataset.clone(), self.text.encoder.clone(), options)?)
    }

    /// One global batch again, with its pixels.
    ///
    /// # Errors
    /// When it can no longer be read.
    pub fn batch_with_pixels(&self, position: u64, bad: &BadSamples) -> Result<FramedBatch, Error> {
        let end = Some(position + self.options.global_batch as u64);
        let mut options = LoaderOptions { start: position, end, pixels: true, ..self.options.clone() };
        options.bad.merge(bad);
        let mut loader = Loader::new(self.dataset.clone(), self.text.encoder.clone(), options)?;
        Ok(self.text.frame(loader.next_batch()?, 1))
    }

    /// A global batch cut into micro-batches, each with its share of samples and tokens.
    pub fn micro_batches<'a>(
        &'a self,
        host: HostBatch,
        encoder: &'a ImageEncoder,
    ) -> impl Iterator<Item = Result<Batch, Error>> + 'a {
        let framed = self.text.frame(host, self.options.pad_to_multiple);
        let (size, tokens) = (framed.host.size, framed.target_count(self.rule));
        let step = self.micro_batch.min(size);
        let features = self.cache.as_deref().map_or(Features::Encode(encoder), Features::Memory);
        (0..size).step_by(step).map(move |first| {
            let rows = framed.rows(first..(first + step).min(size), self.options.pad_to_multiple);
            let share = Share {
                samples: rows.host.size as f64 / size as f64,
                tokens: rows.target_count(self.rule) as f64 / tokens as f64,
            };
            Batch::new(&rows, features.of(&rows.host, encoder)?, self.rule, share, self.options.seed)
        })
    }

    /// Names the shards' contents, wherever they lie.
    pub fn digest(&self) -> String {
        self.dataset.digest()
    }

    /// Samples in the set.
    pub fn samples(&self) -> u64 {
        self.dataset.len()
    }

    /// What the shards' indices say cannot be used.
    pub fn problems(&self) -> &[Problem] {
        self.dataset.problems()
    }

    /// What the memory cache could not read.
    pub fn quarantined(&self) -> &[Quarantined] {
        self.cache.as_ref().map_or(&[], |cache| &cache.quarantined)
    }
}

/// How shards are opened: `.idx` files go beside them, or into the run's folder where theirs cannot be written.
pub(crate) fn open_options(config: &Config) -> OpenOptions {
    let remote = RemoteOptions { cache: config.data.shard_cache.cache(), ..RemoteOptions::default() };
    OpenOptions { cache_dir: Some(config.run_folder().join("shard_index")), remote, ..OpenOptions::default() }
}

impl ShardCacheConfig {
    /// Says where `dir: auto` is.
    pub fn settle(&mut self, auto: Option<&Path>) {
        if let (AutoOr::Auto, Some(auto)) = (&self.dir, auto) {
            self.dir = AutoOr::Given(auto.to_owned());
        }
    }

    fn cache(&self) -> Option<ShardCache> {
        let max_bytes = (self.max_gib * f64::from(1 << 30)) as u64;
        match &self.dir {
            AutoOr::Given(dir) => Some(ShardCache { dir: dir.clone(), max_bytes }),
            AutoOr::Auto => None,
        }
    }
}

/// `auto`: one thread a core.
pub(crate) fn threads(threads: &AutoOr<usize>) -> usize {
    match threads {
        AutoOr::Given(threads) => *threads,
        AutoOr::Auto => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

pub(crate) fn clean(clean: config::Clean) -> Clean {
    match clean {
        config::Clean::Blip => Clean::Blip,
        config::Clean::None => Clean::None,
    }
}

fn augment(augment: config::Augment) -> Augment {
    match augment {
        config::Augment::CropFlip => Augment::CropFlip,
        config::Augment::None => Augment::None,
    }
}
