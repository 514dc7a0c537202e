//! `cache`: the frozen image encoder's output on disk: fill it ahead of time, say what it holds, check it.

use std::path::PathBuf;

use anyhow::{Result, bail};
use blip2_trainer::config::Config;
use blip2_trainer::device;
use blip2_trainer::feature_cache::{CacheStats, SetReport, build, bytes_text, stats, verify};
use clap::{Args, Subcommand};

use crate::hub;
use crate::launch;
use crate::output::{print, print_json, say};
use crate::progress::Progress;
use crate::shard_cache;

const BUILD_EXAMPLES: &str = "\
Examples:
  blip2 cache build --config stage1.yaml
  blip2 cache build --config stage1.yaml --set data.feature_cache=/scratch/features --set data.feature_views=4

The configuration's data.feature_cache names the folder. Training fills it by itself in its first data.feature_views epochs and evaluations; this
does so ahead of time, for all runs whose encoder and image transform are the same: the held-out set first, then every view of the training sets,
each picture decoded once, a JPEG that is reduced once for each scale. What is there stays: an interrupted build goes on where it was.
Build before a run or after it, not beside it: which pictures a run encodes together depends on what it finds.";

const STATS_EXAMPLES: &str = "\
Examples:
  blip2 cache stats features
  blip2 cache stats features --json";

const VERIFY_EXAMPLES: &str = "\
Examples:
  blip2 cache verify features
  blip2 cache verify features --repair

Reads every row and compares its checksum; the exit code is 1 where one is damaged and not cleared. A damaged row is no danger to a run, which
computes it again. Repair while no run writes to the cache.";

const ALL_EXAMPLES: &str = "\
Examples:
  blip2 cache build --config stage1.yaml
  blip2 cache stats features
  blip2 cache verify features --repair";

/// Fill, describe and check a cache of image features on disk
#[derive(Subcommand)]
#[command(after_help = ALL_EXAMPLES)]
pub(crate) enum CacheCommand {
    Build(BuildArguments),
    Stats(StatsArguments),
    Verify(VerifyArguments),
}

/// Encode every view of the training sets, and the held-out set, ahead of time
#[derive(Args)]
#[command(after_help = BUILD_EXAMPLES)]
pub(crate) struct BuildArguments {
    /// Configuration file of a run
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Override a key of the file
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Say what a cache holds, encoder by encoder
#[derive(Args)]
#[command(after_help = STATS_EXAMPLES)]
pub(crate) struct StatsArguments {
    /// The folder that data.feature_cache names
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object for each encoder and transform
    #[arg(long)]
    json: bool,
}

/// Read every row and list what is damaged
#[derive(Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(crate) struct VerifyArguments {
    /// The folder that data.feature_cache names
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Clear what is damaged, so that it is computed again
    #[arg(long)]
    repair: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl CacheCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            CacheCommand::Build(arguments) => arguments.run(),
            CacheCommand::Stats(arguments) => arguments.run(),
            CacheCommand::Verify(arguments) => arguments.run(),
        }
    }
}

impl BuildArguments {
    fn run(self) -> Result<()> {
        launch::alone("cache build")?;
        let mut config = Config::load(&self.config, &self.sets)?;
        hub::from_environment()?.resolve(&mut config)?;
        config.data.shard_cache.resolve_dir(shard_cache::folder().as_deref());
        let device = device::select(config.run.device)?;
        let progress = Progress::new("views");
        let report = build(&config, device, &mut |done, all| progress.tell(done, all))?;
        drop(progress);
        if self.json {
            return print_json(&report);
        }
        for (set, report) in
            report.held_out.iter().map(|set| ("held-out set", set)).chain([("training", &report.training)])
        {
            for left_out in &report.left_out {
                say(&format!("warning: left out: {left_out}"));
            }
            print(built(set, report))?;
        }
        Ok(())
    }
}

fn built(set: &str, report: &SetReport) -> String {
    let SetReport { folder, pictures, views, there, stored, no_place, row_bytes, left_out } = report;
    let size = bytes_text((there + stored) as f64 * *row_bytes as f64);
    let mut text = format!(
        "{}: {set}: {pictures} pictures, {views} views each: {stored} rows stored, {there} were there, {} left out; {size}",
        folder.display(),
        left_out.len(),
    );
    if *no_place > 0 {
        text += &format!("; data.feature_max_gib has no place for {no_place} more");
    }
    text
}

impl StatsArguments {
    fn run(self) -> Result<()> {
        for key in stats(&self.dir)? {
            if self.json { print_json(&key)? } else { print(described(&key))? }
        }
        Ok(())
    }
}

fn described(stats: &CacheStats) -> String {
    let CacheStats { key, description, shards, pictures, views, rows, bytes, disk_bytes, .. } = stats;
    let (encoder, image) = (&description.encoder, &description.image);
    let format = description.stored_as.as_str();
    let weights: String = encoder.weights.chars().take(16).collect();
    let mut text = format!(
        "{key}\n  encoder      weights {weights}, hidden state {}, {}; {} tokens of {} numbers in {format}\n",
        encoder.layer, encoder.dtype, description.tokens, description.width
    );
    text += &format!(
        "  transform    {} pixels, augment {}, JPEGs {}, resample {}, mean {:?}, deviation {:?}\n",
        image.size, image.augment, image.jpegs, image.resample, image.mean, image.std
    );
    text += &format!("  holds        {pictures} pictures of {shards} shards, {views} views, {rows} rows\n");
    text += &format!(
        "  takes        {} of rows, {} on the disk, {} a picture",
        bytes_text(*bytes as f64),
        bytes_text(*disk_bytes as f64),
        bytes_text(stats.bytes_per_picture)
    );
    for file in &stats.damaged_files {
        text += &format!("\n  damaged      {}", file.display());
    }
    text
}

impl VerifyArguments {
    fn run(self) -> Result<()> {
        let progress = Progress::new("files read");
        let report = verify(&self.dir, self.repair, |done, all| progress.tell(done, all))?;
        drop(progress);
        let bad = report.bad.len();
        if self.json {
            print_json(&report)?;
        } else {
            for found in &report.bad {
                let row = found.row.map_or("the whole file".to_owned(), |row| format!("row {row}"));
                print(format_args!("{}: {row}: {}", found.file.display(), found.reason))?;
            }
            let cleared = if self.repair { ", cleared" } else { "" };
            print(format_args!("{} good rows in {} files, {bad} damaged{cleared}", report.good, report.files))?;
        }
        if bad > 0 && !self.repair {
            bail!("{bad} rows or files are damaged; --repair clears them, to be computed again");
        }
        Ok(())
    }
}
