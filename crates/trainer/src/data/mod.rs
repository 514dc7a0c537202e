//! The training data of a run: the data set, its loader from any stream position, and micro-batches of features.

pub mod batch;
pub mod framed;
pub(crate) mod index_lines;
mod prefix;
pub(crate) mod sets;
pub mod text;

use std::sync::Arc;

use blip2_data::feature_store::Writer;
use blip2_data::{BAD_WINDOW, BadSamples, Corpus, HostBatch, ImageViews, Loader, LoaderOptions, Problem, Quarantined};

use crate::assembly::Assembly;
use crate::config::{AutoOr, Config, Contrastive, FeatureCache, NegativeSamples, Stage, TokenMean};
use crate::data::batch::{Batch, Share};
use crate::data::framed::FramedBatch;
use crate::data::sets::DataSets;
use crate::data::text::TextFrame;
use crate::error::Error;
use crate::features::Features;
use crate::features::disk::{self, DiskFeatures};
use crate::features::encoder::ImageEncoder;
use crate::features::memory::{FillOptions, MemoryCaches};
use crate::ranks::Ranks;
use crate::step::StepMetrics;
use crate::task::TargetRule;

/// Texts are padded to multiples of this on CUDA, where kernels like it.
const CUDA_TEXT_MULTIPLE: usize = 8;

/// The training set of a run.
pub struct TrainData {
    corpus: Arc<Corpus>,
    /// What each set's metrics are called.
    names: Vec<String>,
    features: Features,
    text: TextFrame,
    options: LoaderOptions,
    micro_batch: usize,
    token_mean: TokenMean,
    contrastive: Contrastive,
    rule: TargetRule,
}

impl TrainData {
    /// Makes the training set of open sets and fills its memory cache where the run has one; `images` hears of `(done, all)`.
    ///
    /// # Errors
    /// When the shards cannot be read, or more images than allowed cannot be used.
    pub fn open(
        config: &Config,
        sets: &DataSets,
        assembly: &Assembly,
        ranks: &dyn Ranks,
        caches: &mut MemoryCaches,
        images: &mut dyn FnMut(u64, u64),
    ) -> Result<TrainData, Error> {
        let (Assembly { encoder, text, .. }, corpus) = (assembly, Arc::clone(&sets.train));
        let loader = &config.data.loader;
        let threads = threads(&loader.threads);
        let clean = config.data.text.clean;
        let features = match &config.data.feature_cache {
            FeatureCache::Off => Features::Encode,
            FeatureCache::Memory => {
                let options = FillOptions { threads, clean };
                Features::Memory(caches.get_or_fill(&corpus, &text.encoder, encoder, &options, ranks, images)?)
            }
            FeatureCache::Directory(folder) => {
                let writer = Writer::Steps(run_number(config, &corpus));
                Features::Disk(DiskFeatures::of_training(folder, config, encoder, sets, writer)?)
            }
        };
        let views = features.disk().map(|disk| {
            let features = Some(disk.rows().clone());
            ImageViews { count: disk::views(config), features }
        });
        let cuda = matches!(encoder.device(), tch::Device::Cuda(_));
        let left_out = features.left_out();
        // As the loader counts: a share of the last 10,000, so that one bad picture does not stop a small set.
        if left_out.len() as f64 > loader.max_bad_fraction * corpus.len().max(BAD_WINDOW) as f64 {
            return Err(Error::Mismatch(format!(
                "data.train: {} of {} images cannot be used, more than data.loader.max_bad_fraction ({}) allows; the first: {}",
                left_out.len(),
                corpus.len(),
                loader.max_bad_fraction,
                features.quarantined().first().map(Quarantined::to_string).unwrap_or_default()
            )));
        }
        let options = LoaderOptions {
            seed: config.run.seed,
            global_batch: config.schedule.global_batch,
            rank: ranks.rank(),
            world: ranks.world(),
            start: 0,
            end: None,
            threads,
            prefetch: loader.prefetch,
            augment: config.data.image.augment,
            jpegs: config.data.image.jpegs,
            image_size: encoder.preprocessing().size,
            filter: encoder.preprocessing().filter,
            pixels: features.needs_pixels(),
            views,
            clean,
            lanes: config.data.lanes,
            window_shards: loader.window_shards,
            max_bad_fraction: loader.max_bad_fraction,
            pad_id: text.pad_id,
            pad_to_multiple: if cuda { CUDA_TEXT_MULTIPLE } else { 1 },
            bad: BadSamples::default(),
            left_out,
        };
        let names = set_names(config);
        let task = &config.task;
        let (token_mean, contrastive, rule) = (task.token_mean, task.contrastive, assembly.task.target_rule());
        let (text, micro_batch) = (text.clone(), config.micro_batch());
        Ok(TrainData { corpus, names, features, text, options, micro_batch, token_mean, contrastive, rule })
    }

    /// The stream from a position on, without the samples of `bad`, a checkpoint's list, and what the cache could not read.
    ///
    /// # Errors
    /// When the options contradict the data.
    pub fn loader(&self, start: u64, bad: &BadSamples) -> Result<Loader, Error> {
        let options = LoaderOptions { start, bad: bad.clone(), ..self.options.clone() };
        Ok(Loader::new(self.corpus.clone(), self.text.encoder.clone(), options)?)
    }

    /// This rank's slice of a global batch again, with its pixels.
    ///
    /// # Errors
    /// When it can no longer be read.
    pub fn batch_with_pixels(&self, position: u64, bad: &BadSamples) -> Result<FramedBatch, Error> {
        let end = Some(position + self.options.global_batch as u64);
        let mut options =
            LoaderOptions { start: position, end, pixels: true, bad: bad.clone(), ..self.options.clone() };
        if let Some(views) = &mut options.views {
            views.features = None;
        }
        let mut loader = Loader::new(self.corpus.clone(), self.text.encoder.clone(), options)?;
        Ok(self.text.frame(loader.next_batch()?, 1))
    }

    /// A slice of a global batch cut into micro-batches, each with its share of all ranks' samples and tokens.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn micro_batches<'a>(
        &'a self,
        host: HostBatch,
        encoder: &'a ImageEncoder,
        ranks: &dyn Ranks,
    ) -> Result<impl ExactSizeIterator<Item = Result<Batch, Error>> + use<'a>, Error> {
        let mut framed = self.text.frame(host, self.options.pad_to_multiple);
        let (size, own_tokens) = (framed.host.size, framed.target_count(self.rule));
        let said = ranks.share_numbers(&[own_tokens as u64, framed.host.text_len as u64])?;
        let samples = (size * ranks.world()) as f64;
        let tokens = match self.token_mean {
            TokenMean::Global => said.iter().map(|rank| rank[0]).sum::<u64>() as f64,
            TokenMean::Rank => (own_tokens * ranks.world()) as f64,
        };
        // Texts that are exchanged between ranks or micro-batches are of one width.
        let exchanged = !ranks.is_alone() || self.contrastive == Contrastive::Cached;
        let widest = said.iter().map(|rank| rank[1]).max().filter(|_| exchanged).unwrap_or(0) as usize;
        let (step, kind) = (self.micro_batch.min(size), self.features.kind(encoder));
        Ok((0..size).step_by(step).map(move |first| {
            let rows = match step == size {
                // The only part, without a copy of its pixels.
                true => std::mem::take(&mut framed),
                false => framed.rows(first..(first + step).min(size), self.options.pad_to_multiple),
            };
            let rows = rows.widened(widest, self.options.pad_id);
            let share = Share {
                samples: rows.host.size as f64 / samples,
                tokens: rows.target_count(self.rule) as f64 / tokens,
            };
            let features = self.features.of(&rows.host, encoder)?;
            Ok(Batch::new(&rows, features, self.rule, share, self.options.seed)?.sent_as(kind))
        }))
    }

    /// What part of the last step's features was on disk before it; nothing without such a cache.
    pub(crate) fn take_cache_metrics(&self) -> StepMetrics {
        self.features.disk().map(DiskFeatures::take_metrics).unwrap_or_default()
    }

    /// That the cache on disk takes no more; said once.
    pub(crate) fn take_note(&self) -> Option<String> {
        self.features.disk().and_then(DiskFeatures::take_note)
    }

    /// One line about the cache on disk.
    pub(crate) fn cache_introduction(&self) -> Option<String> {
        self.features.disk().map(DiskFeatures::introduction)
    }

    /// Samples in the set.
    pub fn samples(&self) -> u64 {
        self.corpus.len()
    }

    /// What the shards' indices say cannot be used.
    pub fn problems(&self) -> Vec<Problem> {
        self.corpus.problems().cloned().collect()
    }

    /// A line for each set with a filter: how many samples it lets through.
    pub fn filters(&self) -> Vec<String> {
        let sets = self.names.iter().zip(self.corpus.sets());
        let filtered = sets.filter(|(_, set)| set.passed().passed < set.passed().of);
        filtered.map(|(name, set)| format!("data set {name}: {}", set.passed())).collect()
    }

    /// How far each set has been read at `position`: `data/NAME/samples`, `data/NAME/epochs`; and what the cache of fetched shards was good for
    /// on this rank, where there is one: `shard_cache/hit_rate`, `shard_cache/fetched_mib`, `shard_cache/wait_s`.
    pub fn progress(&self, loader: &Loader, position: u64) -> Vec<(String, f64)> {
        let sets = self.names.iter().zip(loader.drawn(position));
        let drawn = sets.flat_map(|(name, drawn)| {
            [(format!("data/{name}/samples"), drawn.samples as f64), (format!("data/{name}/epochs"), drawn.epochs())]
        });
        let cache = self.corpus.cache_use().into_iter().flat_map(|cache| {
            [
                ("shard_cache/hit_rate".into(), cache.hits as f64 / cache.opened.max(1) as f64),
                ("shard_cache/fetched_mib".into(), cache.fetched_bytes as f64 / f64::from(1 << 20)),
                ("shard_cache/wait_s".into(), cache.wait_s),
            ]
        });
        drawn.chain(cache).collect()
    }

    /// What the memory cache could not read.
    pub fn quarantined(&self) -> &[Quarantined] {
        self.features.quarantined()
    }
}

/// Every rank computes as many samples, in as many micro-batches.
pub(crate) fn check_shares(config: &Config, world: usize) -> Result<(), Error> {
    let global = config.schedule.global_batch;
    if !global.is_multiple_of(world) {
        let expected = format!("a multiple of the number of ranks, {world}");
        return Err(Error::key("schedule.global_batch", expected, global, ""));
    }
    let micro = config.micro_batch();
    if config.schedule.micro_batch.is_some() && !(global / world).is_multiple_of(micro) {
        let share = global / world;
        let expected = format!("a divisor of a rank's share of the global batch, {global} / {world} = {share}");
        return Err(Error::key("schedule.micro_batch", expected, micro, ""));
    }
    let losses = &config.task.losses;
    let alone = micro.min(global / world) < 2;
    let matched = config.task.stage == Stage::One && losses.itm > 0.0;
    if config.task.negatives == NegativeSamples::Local && matched && alone {
        let expected = "at least 2 samples in a forward pass of a rank";
        let got = format!("1 (schedule.global_batch {global} over {world} ranks)");
        return Err(Error::key("task.negatives: local", expected, got, "set global, or a larger batch"));
    }
    Ok(())
}

/// The names that the configuration gives, else the sets' places in the list.
fn set_names(config: &Config) -> Vec<String> {
    let sets = config.data.train.iter().enumerate();
    sets.map(|(place, set)| set.name.clone().unwrap_or_else(|| place.to_string())).collect()
}

/// Names a run in a feature cache: equal whenever the same configuration trains on the same shards, so that a resumed run knows its rows.
pub(crate) fn run_number(config: &Config, corpus: &Corpus) -> u64 {
    let digest = blake3::hash(format!("{} {}", config.digest(), corpus.digest()).as_bytes());
    let first: [u8; 8] = std::array::from_fn(|at| digest.as_bytes()[at]);
    u64::from_le_bytes(first)
}

/// `auto`: one thread a core.
pub(crate) fn threads(threads: &AutoOr<usize>) -> usize {
    match threads {
        AutoOr::Given(threads) => *threads,
        AutoOr::Auto => std::thread::available_parallelism().map_or(1, usize::from),
    }
}
