//! Reads and decodes every sample of a data set and lists what is wrong.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use crate::caption::Pick;
use crate::image::decode;
use crate::sample::guarded;
use crate::scan::Problem;
use crate::{Clean, Dataset, SampleError, clean_caption};

/// What a whole pass over a data set found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shards read.
    pub shards: usize,
    /// Samples that can be used.
    pub good: u64,
    /// What cannot: first what the indices say, then samples that fail, in the order of the data set.
    pub problems: Vec<Problem>,
}

/// Reads, decodes and cleans every sample; `progress` is called with the number done and of all.
pub fn verify(dataset: &Dataset, clean: Clean, progress: impl Fn(u64, u64) + Sync) -> VerifyReport {
    check_all(dataset, clean, progress).report
}

/// The samples that fail, by their indices in ascending order, with the report on all.
pub(crate) struct Found {
    pub(crate) failed: Vec<u64>,
    pub(crate) report: VerifyReport,
}

pub(crate) fn check_all(dataset: &Dataset, clean: Clean, progress: impl Fn(u64, u64) + Sync) -> Found {
    let done = AtomicU64::new(0);
    let (failed, problems): (Vec<u64>, Vec<Problem>) = (0..dataset.len())
        .into_par_iter()
        .filter_map(|index| {
            let error = guarded(|| verify_one(dataset, index, clean)).err();
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, dataset.len());
            let (shard, key) = error.as_ref().and_then(|_| dataset.key(index).ok()).unwrap_or_default();
            error.map(|error| (index, Problem { shard, key, reason: error.to_string() }))
        })
        .unzip();
    let report = VerifyReport {
        shards: dataset.shards().len(),
        good: dataset.len() - failed.len() as u64,
        problems: dataset.problems().iter().cloned().chain(problems).collect(),
    };
    Found { failed, report }
}

fn verify_one(dataset: &Dataset, index: u64, clean: Clean) -> Result<(), SampleError> {
    let raw = dataset.read(index, Pick::First)?;
    decode(&raw.image)?;
    match clean_caption(&raw.caption, clean).is_empty() {
        true => Err(SampleError::CaptionEmpty),
        false => Ok(()),
    }
}
