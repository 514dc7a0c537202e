//! How large the images and how long the captions of a data set are.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use crate::dataset::SampleHeader;
use crate::loader::sample::guarded;
use crate::{DataError, Dataset};

/// A data set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Tar files.
    pub shards: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Samples with image and caption.
    pub samples: u64,
    /// Entries of the indices' problem lists.
    pub problems: usize,
    /// Samples whose caption or image header cannot be read; not in the numbers below.
    pub unreadable: u64,
    /// Samples by image format.
    pub formats: BTreeMap<&'static str, u64>,
    /// Pixels a row.
    pub width: Summary,
    /// Rows.
    pub height: Summary,
    /// Width by height, in percent: 133 for 4:3, 100 for a square, 75 for 3:4.
    pub aspect_percent: Summary,
    /// Bytes of the image files.
    pub image_bytes: Summary,
    /// Words of the captions, as they stand in the shards.
    pub caption_words: Summary,
}

/// The distribution of one number over the samples; zeros when there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Smallest.
    pub min: u64,
    /// Half of the samples are at most this.
    pub median: u64,
    /// 95 of 100 samples are at most this.
    pub p95: u64,
    /// Largest.
    pub max: u64,
    /// Arithmetic mean.
    pub mean: f64,
}

#[derive(Default)]
struct Counts {
    unreadable: u64,
    formats: BTreeMap<&'static str, u64>,
    width: Histogram,
    height: Histogram,
    aspect_percent: Histogram,
    image_bytes: Histogram,
    caption_words: Histogram,
}

/// Reads every sample, of the images only the headers; `progress` is called with the number done and of all.
///
/// # Errors
/// When this machine or its shard cache cannot read on: that says nothing of the samples.
pub fn stats(dataset: &Dataset, progress: impl Fn(u64, u64) + Sync) -> Result<Stats, DataError> {
    let (done, mut counts) = (AtomicU64::new(0), Counts::default());
    for stretch in dataset.stretches() {
        let more = stretch
            .into_par_iter()
            .try_fold(Counts::default, |mut counts, index| {
                counts.add(dataset, index)?;
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, dataset.len());
                Ok::<_, DataError>(counts)
            })
            .try_reduce(Counts::default, |one, other| Ok(one.merge(other)))?;
        counts = counts.merge(more);
    }
    dataset.prefetch(&[]);
    Ok(Stats {
        shards: dataset.shards().len(),
        bytes: dataset.shards().iter().map(|shard| shard.bytes).sum(),
        samples: dataset.len(),
        problems: dataset.problems().len(),
        unreadable: counts.unreadable,
        formats: counts.formats,
        width: counts.width.summary(),
        height: counts.height.summary(),
        aspect_percent: counts.aspect_percent.summary(),
        image_bytes: counts.image_bytes.summary(),
        caption_words: counts.caption_words.summary(),
    })
}

impl Counts {
    fn add(&mut self, dataset: &Dataset, index: u64) -> Result<(), DataError> {
        let header = match guarded(|| dataset.header(index)) {
            Ok(header) => header,
            Err(error) => {
                dataset.machine_fault(index, error)?;
                self.unreadable += 1;
                return Ok(());
            }
        };
        let SampleHeader { format, width, height, image_bytes, caption } = header;
        *self.formats.entry(format.name()).or_default() += 1;
        self.width.add(width as u64);
        self.height.add(height as u64);
        self.aspect_percent.add(((width * 100 + height / 2) / height) as u64);
        self.image_bytes.add(image_bytes);
        self.caption_words.add(caption.split_whitespace().count() as u64);
        Ok(())
    }

    fn merge(mut self, other: Counts) -> Counts {
        self.unreadable += other.unreadable;
        for (format, count) in other.formats {
            *self.formats.entry(format).or_default() += count;
        }
        self.width.merge(other.width);
        self.height.merge(other.height);
        self.aspect_percent.merge(other.aspect_percent);
        self.image_bytes.merge(other.image_bytes);
        self.caption_words.merge(other.caption_words);
        self
    }
}

/// How often each value occurs.
#[derive(Default)]
struct Histogram(BTreeMap<u64, u64>);

impl Histogram {
    fn add(&mut self, value: u64) {
        *self.0.entry(value).or_default() += 1;
    }

    fn merge(&mut self, other: Histogram) {
        for (value, count) in other.0 {
            *self.0.entry(value).or_default() += count;
        }
    }

    fn summary(&self) -> Summary {
        let total: u64 = self.0.values().sum();
        let (Some((&min, _)), Some((&max, _))) = (self.0.first_key_value(), self.0.last_key_value()) else {
            return Summary::default();
        };
        let quantile = |percent: u64| {
            let wanted = (total * percent).div_ceil(100);
            let mut seen = 0;
            let reached = self.0.iter().find(|(_, count)| {
                seen += **count;
                seen >= wanted
            });
            reached.map_or(max, |(value, _)| *value)
        };
        let sum: f64 = self.0.iter().map(|(value, count)| *value as f64 * *count as f64).sum();
        Summary { min, median: quantile(50), p95: quantile(95), max, mean: sum / total as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_knows_its_quantiles() {
        let mut histogram = Histogram::default();
        (1..=100).for_each(|value| histogram.add(value));
        let mut other = Histogram::default();
        other.add(1000);
        histogram.merge(other);
        let summary = histogram.summary();
        assert_eq!((summary.min, summary.median, summary.p95, summary.max), (1, 51, 96, 1000));
        assert!((summary.mean - 6050.0 / 101.0).abs() < 1e-9);
        assert_eq!(Histogram::default().summary(), Summary::default());
    }
}
