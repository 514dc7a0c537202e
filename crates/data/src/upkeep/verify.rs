//! Reads and decodes every sample of a data set and lists what is wrong.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use crate::image::decode;
use crate::loader::sample::guarded;
use crate::shards::scan::Problem;
use crate::text::caption::Pick;
use crate::text::says_something;
use crate::{Clean, DataError, Dataset, SampleError};

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
///
/// # Errors
/// When this machine or its shard cache cannot read on: that says nothing of the samples.
pub fn verify(dataset: &Dataset, clean: Clean, progress: impl Fn(u64, u64) + Sync) -> Result<VerifyReport, DataError> {
    check_all(dataset, clean, progress).map(|found| found.report)
}

/// The samples that fail, by their indices in ascending order, with the report on all.
pub(crate) struct Found {
    pub(crate) failed: Vec<u64>,
    pub(crate) report: VerifyReport,
}

pub(crate) fn check_all(
    dataset: &Dataset,
    clean: Clean,
    progress: impl Fn(u64, u64) + Sync,
) -> Result<Found, DataError> {
    let done = AtomicU64::new(0);
    let check = |index: u64| {
        let error = guarded(|| verify_one(dataset, index, clean)).err();
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, dataset.len());
        let problem = |error: SampleError| {
            let (shard, key) = dataset.named(index);
            (index, Problem { shard, key, reason: error.to_string() })
        };
        error.map(|error| dataset.machine_fault(index, error).map(problem))
    };
    let (mut failed, mut problems) = (Vec::new(), Vec::new());
    for stretch in dataset.stretches() {
        let found: Vec<(u64, Problem)> = stretch.into_par_iter().filter_map(check).collect::<Result<_, DataError>>()?;
        for (index, problem) in found {
            failed.push(index);
            problems.push(problem);
        }
    }
    dataset.prefetch(&[]);
    let report = VerifyReport {
        shards: dataset.shards().len(),
        good: dataset.len() - failed.len() as u64,
        problems: dataset.problems().iter().cloned().chain(problems).collect(),
    };
    Ok(Found { failed, report })
}

fn verify_one(dataset: &Dataset, index: u64, clean: Clean) -> Result<(), SampleError> {
    let raw = dataset.read_usable(index, Pick::First, &|text| says_something(text, clean))?;
    decode(&raw.image)?;
    match says_something(&raw.caption, clean) {
        true => Ok(()),
        false => Err(SampleError::CaptionEmpty),
    }
}
