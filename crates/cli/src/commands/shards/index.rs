//! `shards index`.

use anyhow::Result;
use blip2_trainer::shards::{reindex, rescan, write_manifest};
use clap::Args;

use super::SetArguments;
use crate::output::{print, print_json};

const INDEX_EXAMPLES: &str = "\
Examples:
  blip2 shards index 'shards/{00000..00099}.tar'
  blip2 shards index 'shards/*.tar' --cache-dir ~/.cache/shards
  blip2 shards index 's3://bucket/{00000..99999}.tar' --manifest s3://bucket/manifest.jsonl

Training builds missing indices by itself; this builds them anew and ahead of time, with a digest of every shard. A manifest lists shards,
lengths, counts and digests: a configuration whose shards: names it opens without a look at the shards. Credentials and endpoints of
stores come from the environment, as AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT or AZURE_STORAGE_ACCOUNT_KEY.";

/// Build the indices of shards anew
#[derive(Args)]
#[command(after_help = INDEX_EXAMPLES)]
pub(crate) struct IndexArguments {
    #[command(flatten)]
    set: SetArguments,
    /// File or URL that gets a manifest of the shards; its name ends in .jsonl
    #[arg(long, value_name = "FILE|URL")]
    manifest: Option<String>,
    /// Fetch and read shards of stores and web servers also where an index lies beside them
    #[arg(long)]
    rescan: bool,
    /// Print one JSON object for each shard
    #[arg(long)]
    json: bool,
}

impl IndexArguments {
    pub(super) fn run(self) -> Result<()> {
        let options = self.set.options();
        let index = if self.rescan { rescan } else { reindex };
        let shards = index(&self.set.patterns, &options)?;
        if let Some(manifest) = &self.manifest {
            write_manifest(&shards, manifest, &options)?;
        }
        for shard in &shards {
            let (location, samples, problems) = (&shard.location, shard.samples, shard.problems);
            if self.json {
                let location = location.to_string();
                print_json(&serde_json::json!({
                    "shard": location, "bytes": shard.bytes, "samples": samples, "problems": problems
                }))?;
            } else {
                print(format_args!("{location}: {samples} samples, {problems} problems"))?;
            }
        }
        if self.json {
            return Ok(());
        }
        let samples: u64 = shards.iter().map(|shard| shard.samples).sum();
        let problems: u64 = shards.iter().map(|shard| shard.problems).sum();
        print(format_args!("{samples} samples in {} shards, {problems} problems", shards.len()))
    }
}
