//! `shards`: make, index, check and repair tar shards of image-text pairs.

mod index;
mod pack;
mod stats;
mod verify;

pub(super) use pack::PackedArguments;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use blip2_trainer::shards::{
    CaptionRule, CaptionSource, Dataset, JsonPath, OpenOptions, RemoteOptions, Retries, ShardCache,
};
use clap::{Args, Subcommand};

use crate::progress::Progress;
use crate::shard_cache;

const EXAMPLES: &str = "\
Examples:
  blip2 shards pack --captions pairs.jsonl --out shards
  blip2 shards index 'shards/*.tar'
  blip2 shards verify 'shards/*.tar'
  blip2 shards stats 'shards/*.tar' --sheet sheet.png";

/// Make, index and check tar shards of image-text pairs (WebDataset naming)
#[derive(Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum ShardsCommand {
    Pack(pack::PackArguments),
    Index(index::IndexArguments),
    Verify(verify::VerifyArguments),
    Stats(stats::StatsArguments),
}

#[derive(Args)]
pub(super) struct SetArguments {
    /// Paths or URLs (s3, gs, az, abfs, https) of tar shards with *, ?, [...] and {00000..00099}, or a manifest
    #[arg(value_name = "PATTERN", required = true)]
    pub(super) patterns: Vec<String>,
    /// Folder of the indices whose shards lie where nothing can be written
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Folder for shards that are fetched; left out, blip2/shards in the user's cache folder
    #[arg(long, value_name = "DIR")]
    shard_cache: Option<PathBuf>,
    /// All shards in it take at most this
    #[arg(long, value_name = "GIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    shard_cache_gib: u32,
    /// Seconds without a new byte after which a shard that is fetched counts as unreadable
    #[arg(long, value_name = "S", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    give_up_s: u32,
    /// Field of a .json member that holds the caption
    #[arg(long, value_name = "NAME", default_value = "caption")]
    caption_field: String,
}

impl ShardsCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            ShardsCommand::Pack(arguments) => arguments.run(),
            ShardsCommand::Index(arguments) => arguments.run(),
            ShardsCommand::Verify(arguments) => arguments.run(),
            ShardsCommand::Stats(arguments) => arguments.run(),
        }
    }
}

impl SetArguments {
    pub(super) fn options(&self) -> OpenOptions {
        let max_bytes = u64::from(self.shard_cache_gib) << 30;
        let dir = self.shard_cache.clone().or_else(shard_cache::folder);
        let cache = dir.map(|dir| ShardCache { dir, max_bytes });
        let give_up = Duration::from_secs(self.give_up_s.into());
        let retries = Retries { give_up, ..Retries::default() };
        OpenOptions {
            remote: RemoteOptions { cache, retries, ..RemoteOptions::default() },
            cache_dir: self.cache_dir.clone(),
            captions: CaptionRule { source: CaptionSource::TextOr(JsonPath::new(&self.caption_field)), template: None },
            progress: Some(counter("shards indexed")),
            ..OpenOptions::default()
        }
    }

    /// The set without the shards that cannot be read at all, which are among its problems.
    pub(super) fn open_what_can_be_read(&self) -> Result<Dataset> {
        let options = OpenOptions { tolerate_unreadable: true, ..self.options() };
        Ok(Dataset::open(&self.patterns, &options)?)
    }

    fn open(&self) -> Result<Dataset> {
        Ok(Dataset::open(&self.patterns, &self.options())?)
    }
}

fn counter(what: &'static str) -> Arc<dyn Fn(usize, usize) + Send + Sync> {
    let progress = Progress::new(what);
    Arc::new(move |done, all| progress.tell(done as u64, all as u64))
}
