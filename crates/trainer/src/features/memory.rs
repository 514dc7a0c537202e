//! Image features of a whole set in memory. Ranks share the encoding out, and each then holds all of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use blip2_data::{Clean, Corpus, EvalOptions, EvalReader, Quarantined, TextEncoder};
use tch::{Device, Kind, Tensor, no_grad};

use crate::error::Error;
use crate::features::encoder::ImageEncoder;
use crate::features::{ENCODE_BATCH, encode};
use crate::ranks::{Ranks, share};

/// Rows of a rank that are sent at once.
const SENT_ROWS: i64 = 256;

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
        ranks: &dyn Ranks,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Rc<MemoryCache>, Error> {
        let (seen, clean) = (encoder.preprocessing(), options.clean);
        let key = format!("{} {} {seen:?} {clean:?}", encoder.identity(), corpus.identity());
        if let Some(cache) = self.filled.get(&key) {
            return Ok(cache.clone());
        }
        let cache = Rc::new(MemoryCache::fill(corpus, text, encoder, options, ranks, progress)?);
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
    /// Encodes the whole set once, this rank its share of it. `progress` hears of `(done, all)` of that share.
    ///
    /// # Errors
    /// When the set cannot be read or holds no usable image, or a rank is lost.
    pub fn fill(
        corpus: &Arc<Corpus>,
        text: &Arc<TextEncoder>,
        encoder: &ImageEncoder,
        options: &FillOptions,
        ranks: &dyn Ranks,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<MemoryCache, Error> {
        let range = share_of(ranks.rank(), ranks.world(), corpus.len());
        let reader = EvalReader::new(
            corpus.clone(),
            text.clone(),
            EvalOptions {
                range: range.clone(),
                batch: ENCODE_BATCH,
                threads: options.threads,
                prefetch: 2,
                image_size: encoder.preprocessing().size,
                filter: encoder.preprocessing().filter,
                pixels: true,
                features: None,
                clean: options.clean,
                pad_id: 0,
                pad_to_multiple: 1,
                left_out: Arc::default(),
            },
        )?;
        let own = Part::encode(reader, range, corpus.len(), encoder, progress)?;
        let Part { indices, features, quarantined } = if ranks.is_alone() { own } else { own.of_all(ranks)? };
        let features = features.ok_or_else(|| {
            let (all, first) = (corpus.len(), quarantined.first().map(ToString::to_string).unwrap_or_default());
            Error::Mismatch(format!("none of the {all} samples of the set can be read; the first: {first}"))
        })?;
        Ok(MemoryCache { features, rows: indices.into_iter().zip(0..).collect(), quarantined })
    }

    /// What could not be read.
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// Features of samples by index, `f32 [B, N, width]`.
    pub(crate) fn rows(&self, indices: &[u64]) -> Result<Tensor, Error> {
        let rows: Option<Vec<i64>> = indices.iter().map(|i| self.rows.get(i).copied()).collect();
        let rows = rows.ok_or_else(|| Error::Mismatch("a sample without cached features".into()))?;
        Ok(self.features.index_select(0, &Tensor::from_slice(&rows)).to_kind(Kind::Float))
    }
}

/// A rank's samples: whole encoding batches, so that each image is encoded among the same ones on any number of ranks.
fn share_of(rank: usize, world: usize, samples: u64) -> Range<u64> {
    let batch = ENCODE_BATCH as u64;
    let batches = samples.div_ceil(batch);
    let begin = |rank: usize| (batches * rank as u64 / world as u64 * batch).min(samples);
    begin(rank)..begin(rank + 1)
}

/// Consecutive samples of a set with their features.
struct Part {
    /// Of the samples that could be read, in ascending order.
    indices: Vec<u64>,
    /// bf16 on the host, `[samples that could be read, N, width]`; `None` where there is none.
    features: Option<Tensor>,
    quarantined: Vec<Quarantined>,
}

impl Part {
    fn encode(
        mut reader: EvalReader,
        range: Range<u64>,
        whole: u64,
        encoder: &ImageEncoder,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Part, Error> {
        let samples = range.end - range.start;
        let (mut store, mut indices): (Option<Tensor>, Vec<u64>) = (None, Vec::new());
        for batch in reader.by_ref() {
            let batch = batch?;
            let features = encode(&batch, encoder)?;
            // One allocation for all: stacking pieces at the end would need it twice.
            let store = match &mut store {
                Some(store) => store,
                None => {
                    check_room(whole, &features.size())?;
                    store.insert(empty(samples as i64, &features.size()))
                }
            };
            no_grad(|| store.narrow(0, indices.len() as i64, batch.size as i64).copy_(&features));
            indices.extend(&batch.sample_index);
            progress(indices.last().map_or(0, |index| index + 1 - range.start), samples);
        }
        let features = store.map(|store| store.narrow(0, 0, indices.len() as i64));
        Ok(Part { indices, features, quarantined: reader.take_quarantined() })
    }

    /// The parts of all ranks one behind the other.
    fn of_all(self, ranks: &dyn Ranks) -> Result<Part, Error> {
        let shape = self.features.as_ref().map(Tensor::size).unwrap_or_default();
        let parts: Vec<(Vec<u64>, Vec<Quarantined>, Vec<i64>)> =
            share(ranks, &(self.indices.clone(), self.quarantined.clone(), shape))?;
        let shape = parts.iter().map(|(.., shape)| shape).find(|shape| !shape.is_empty());
        let rows: Vec<i64> = parts.iter().map(|(indices, ..)| indices.len() as i64).collect();
        let features = shape.map(|shape| gather(self.features.as_ref(), &rows, shape, ranks)).transpose()?;
        let (mut indices, mut quarantined) = (Vec::new(), Vec::new());
        for (of_rank, bad, _) in parts {
            indices.extend(of_rank);
            quarantined.extend(bad);
        }
        Ok(Part { indices, features, quarantined })
    }
}

/// All ranks' features in the order of ranks, which have `rows` each, a piece of each at a time.
fn gather(own: Option<&Tensor>, rows: &[i64], shape: &[i64], ranks: &dyn Ranks) -> Result<Tensor, Error> {
    let all = empty(rows.iter().sum(), shape);
    let longest = rows.iter().copied().max().unwrap_or(0);
    for first in (0..longest).step_by(SENT_ROWS as usize) {
        let sent = SENT_ROWS.min(longest - first);
        let here = |rows: i64| (rows - first).clamp(0, sent);
        let piece = empty(sent, shape).zero_();
        if let Some(own) = own {
            let count = here(own.size()[0]);
            no_grad(|| piece.narrow(0, 0, count).copy_(&own.narrow(0, own.size()[0].min(first), count)));
        }
        let pieces = ranks.gather(&piece)?;
        let mut begin = 0;
        for (rank, &rows) in rows.iter().enumerate() {
            let count = here(rows);
            if count > 0 {
                let source = pieces.narrow(0, rank as i64 * sent, count);
                no_grad(|| all.narrow(0, begin + first, count).copy_(&source));
            }
            begin += rows;
        }
    }
    Ok(all)
}

/// Whether the features of a whole set have room in this machine's memory, as far as it says how much is free.
fn check_room(samples: u64, shape: &[i64]) -> Result<(), Error> {
    let bytes = samples * (shape[1] * shape[2]) as u64 * 2;
    match free_memory() {
        Some(free) if bytes > free => {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            Err(Error::Mismatch(format!(
                "data.feature_cache: memory: the features of {samples} pictures take {:.1} GiB, {:.1} GiB are free; name a folder instead, or set off",
                gib(bytes),
                gib(free)
            )))
        }
        _ => Ok(()),
    }
}

/// Bytes that Linux says programs may still take.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Room for the features of so many samples; `shape` is that of any batch.
fn empty(samples: i64, shape: &[i64]) -> Tensor {
    Tensor::empty([samples, shape[1], shape[2]], (Kind::BFloat16, Device::Cpu))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_batches_that_cover_the_set() {
        for samples in [0, 1, 31, 32, 33, 1667] {
            for world in 1..9 {
                let shares: Vec<Range<u64>> = (0..world).map(|rank| share_of(rank, world, samples)).collect();
                assert_eq!((shares[0].start, shares[world - 1].end), (0, samples));
                for pair in shares.windows(2) {
                    assert_eq!(pair[0].end, pair[1].start);
                    assert!(pair[0].end % 32 == 0 || pair[0].end == samples);
                }
            }
        }
    }
}
