//! `shards verify`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use blip2_trainer::shards::{Clean, Dataset, Outcome, VerifyReport, repair, verify};
use clap::{Args, ValueEnum};

use super::SetArguments;
use crate::output::{print, print_json, say};
use crate::progress::Progress;

const VERIFY_EXAMPLES: &str = "\
Examples:
  blip2 shards verify 'shards/*.tar'
  blip2 shards verify 'shards/{00000..00099}.tar' --clean none --json
  blip2 shards verify 'shards/*.tar' --repair repaired

Reads and decodes every sample. The exit code is 1 where a sample cannot be used. With --repair the folder gets the same shards: those
that are whole as hard links (as copies on another file system), damaged ones written anew without the samples that cannot be used, the
others byte for byte and in their order; one that is no tar file is left out. What was dropped is listed, the exit code is 0, and the
originals are only read.";

/// Read and decode every sample, and list what cannot be used
#[derive(Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(crate) struct VerifyArguments {
    #[command(flatten)]
    set: SetArguments,
    /// How captions are cleaned, since one may be empty afterwards
    #[arg(long, value_name = "HOW", default_value = "blip")]
    clean: CleanArgument,
    /// Folder that gets the shards without what cannot be used
    #[arg(long, value_name = "OUT_DIR")]
    repair: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CleanArgument {
    /// BLIP's cleaning: lower case, few marks, at most 50 words
    Blip,
    /// Case and marks are kept
    None,
}

impl VerifyArguments {
    pub(super) fn run(self) -> Result<()> {
        let set = self.set.open_what_can_be_read()?;
        let clean = match self.clean {
            CleanArgument::Blip => Clean::Blip,
            CleanArgument::None => Clean::None,
        };
        match &self.repair {
            Some(out) => self.repair(&set, clean, out),
            None => self.verify(&set, clean),
        }
    }

    fn verify(&self, set: &Dataset, clean: Clean) -> Result<()> {
        let progress = Progress::new("samples read");
        let report = verify(set, clean, |done, all| progress.tell(done, all))?;
        drop(progress);
        if self.json {
            print_json(&report)?
        } else {
            print_found(&report)?
        }
        match report.problems.len() {
            0 => Ok(()),
            problems => bail!(
                "{problems} problems found; training leaves such samples out, and does not begin with a shard that it cannot index"
            ),
        }
    }

    fn repair(&self, set: &Dataset, clean: Clean, out: &std::path::Path) -> Result<()> {
        let progress = Progress::new("samples read");
        let report = repair(set, clean, out, |done, all| progress.tell(done, all))?;
        drop(progress);
        if self.json {
            return print_json(&report);
        }
        print_found(&report.found)?;
        let mut samples = 0;
        for shard in &report.shards {
            samples += shard.samples;
            let outcome = match shard.outcome {
                Outcome::Linked => "whole, hard link",
                Outcome::Copied => "whole, copy",
                Outcome::Rewritten => "rewritten",
                Outcome::Dropped => "nothing left, not written",
            };
            print(format_args!("{}: {outcome}, {} samples", shard.shard, shard.samples))?;
        }
        say(&format!("repaired shards: {}", out.display()));
        let shards = report.shards.iter().filter(|shard| shard.outcome != Outcome::Dropped).count();
        print(format_args!("{samples} samples in {shards} shards"))
    }
}

fn print_found(report: &VerifyReport) -> Result<()> {
    for problem in &report.problems {
        print(problem)?;
    }
    let (good, shards, problems) = (report.good, report.shards, report.problems.len());
    print(format_args!("{good} good samples in {shards} shards, {problems} problems"))
}
