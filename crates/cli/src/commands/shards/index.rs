//! `shards index`.

use anyhow::Result;
use blip2_trainer::shards::reindex;
use clap::Args;

use super::SetArguments;
use crate::output::{print, print_json};

const INDEX_EXAMPLES: &str = "\
Examples:
  blip2 shards index 'shards/{00000..00099}.tar'
  blip2 shards index 'shards/*.tar' --cache-dir ~/.cache/shards

Training builds missing indices by itself; this builds them anew and ahead of time.";

/// Build the indices of shards anew
#[derive(Args)]
#[command(after_help = INDEX_EXAMPLES)]
pub(crate) struct IndexArguments {
    #[command(flatten)]
    set: SetArguments,
    /// Print one JSON object for each shard
    #[arg(long)]
    json: bool,
}

impl IndexArguments {
    pub(super) fn run(self) -> Result<()> {
        let shards = reindex(&self.set.patterns, &self.set.options())?;
        let (mut samples, mut problems) = (0, 0);
        for shard in &shards {
            let header = &shard.header;
            (samples, problems) = (samples + header.samples, problems + header.problems as usize);
            if self.json {
                let line = serde_json::json!({
                    "shard": shard.path, "bytes": header.tar_bytes, "samples": header.samples, "problems": header.problems
                });
                print_json(&line)?;
            } else {
                print(format_args!(
                    "{}: {} samples, {} problems",
                    shard.path.display(),
                    header.samples,
                    header.problems
                ))?;
            }
        }
        if self.json {
            Ok(())
        } else {
            print(format_args!("{samples} samples in {} shards, {problems} problems", shards.len()))
        }
    }
}
