//! `bench pack`: how many pictures a second are packed into shards, and in how much memory.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use blip2_data::{PackOptions, pack};
use blip2_torchx::memory;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;

use crate::error::Error;

/// What is packed for the measurement.
#[derive(Clone)]
pub struct PackingOptions {
    /// The source and what becomes of it; `out` is the folder below which the shards lie until they are removed.
    pub pack: PackOptions,
    /// Threads that read, decode and re-encode.
    pub threads: usize,
    /// Times that all of it is packed; the quickest is told.
    pub passes: usize,
}

/// What was measured: the quickest pass.
#[derive(Debug, Clone, Serialize)]
pub struct PackingReport {
    /// Pictures packed.
    pub pictures: u64,
    /// Rows left out.
    pub left_out: u64,
    /// From looking through the source to the last shard, synced.
    pub seconds: f64,
    /// `pictures / seconds`.
    pub pictures_per_s: f64,
    /// Millions of bytes of image files read a second.
    pub mb_per_s: f64,
    /// Millions of bytes of shards written.
    pub shards_mb: f64,
    /// Threads.
    pub threads: usize,
    /// The side that larger images were shrunk to.
    pub longest_side: Option<u32>,
    /// The most memory of this process so far, in MiB, where it can be told.
    pub peak_memory_mib: Option<f64>,
}

/// Packs a source into a folder that is removed behind each pass, and keeps the time.
///
/// # Errors
/// As [`pack`]; a folder that cannot be made, or no pass.
pub fn packing(options: &PackingOptions) -> Result<PackingReport, Error> {
    let pool = ThreadPoolBuilder::new().num_threads(options.threads).build();
    let pool = pool.map_err(|error| Error::Mismatch(format!("threads: {}: {error}", options.threads)))?;
    let mut best = pass(options, &pool)?;
    for _ in 1..options.passes {
        let next = pass(options, &pool)?;
        if next.seconds < best.seconds {
            best = next;
        }
    }
    best.peak_memory_mib = memory::peak_rss_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20));
    Ok(best)
}

fn pass(options: &PackingOptions, pool: &ThreadPool) -> Result<PackingReport, Error> {
    let place = &options.pack.out;
    let scratch = tempfile::tempdir_in(place).map_err(|error| Error::file(place, error))?;
    let options_here = PackOptions { out: scratch.path().join("shards"), ..options.pack.clone() };
    let begin = Instant::now();
    let report = pool.install(|| pack(&options_here))?;
    let seconds = begin.elapsed().as_secs_f64();
    let length = |path: &PathBuf| fs::metadata(path).map(|file| file.len()).map_err(|error| Error::file(path, error));
    let written = report.shards.iter().map(length).sum::<Result<u64, Error>>()?;
    Ok(PackingReport {
        pictures: report.samples,
        left_out: report.left_out,
        seconds,
        pictures_per_s: report.samples as f64 / seconds,
        mb_per_s: report.image_bytes as f64 / 1e6 / seconds,
        shards_mb: written as f64 / 1e6,
        threads: options.threads,
        longest_side: options.pack.reencode.map(|reencode| reencode.longest_side),
        peak_memory_mib: None,
    })
}
