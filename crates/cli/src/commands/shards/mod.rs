//! `shards`: make, index, check and repair tar shards of image-text pairs.

mod index;
mod pack;
mod stats;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use blip2_trainer::shards::{CaptionRule, CaptionSource, Dataset, JsonPath, OpenOptions};
use clap::{Args, Subcommand};

use crate::progress::Progress;

/// Make, index and check tar shards of image-text pairs (WebDataset naming)
#[derive(Subcommand)]
pub(crate) enum ShardsCommand {
    Pack(pack::PackArguments),
    Index(index::IndexArguments),
    Verify(verify::VerifyArguments),
    Stats(stats::StatsArguments),
}

#[derive(Args)]
struct SetArguments {
    /// Path patterns of tar shards: *, ?, [...] and {00000..00099}
    #[arg(value_name = "PATTERN", required = true)]
    patterns: Vec<String>,
    /// Folder of the indices whose shards lie where nothing can be written
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
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
    fn options(&self) -> OpenOptions {
        OpenOptions {
            cache_dir: self.cache_dir.clone(),
            captions: CaptionRule { source: CaptionSource::TextOr(JsonPath::new(&self.caption_field)), template: None },
            progress: Some(counter("shards indexed")),
            ..OpenOptions::default()
        }
    }

    fn open(&self) -> Result<Dataset> {
        Ok(Dataset::open(&self.patterns, &self.options())?)
    }
}

fn counter(what: &'static str) -> Arc<dyn Fn(usize, usize) + Send + Sync> {
    let progress = Progress::new(what);
    Arc::new(move |done, all| progress.tell(done as u64, all as u64))
}
