//! `train`: the stages that configuration files describe, one after the other.

use std::convert::Infallible;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use blip2_trainer::telemetry::Output;
use blip2_trainer::train::{self, Finished, Resume, TrainRequest};
use clap::Args;

use crate::hub;
use crate::launch;
use crate::output::{UsageError, abandon, print, say};
use crate::shard_cache;

pub(crate) const EXAMPLES: &str = "\
Examples:
  train --config stage1.yaml                                       one stage; the same command goes on after an interruption
  train --config stage1.yaml --config stage2.yaml                  two stages; a finished one is skipped
  train --config stage1.yaml --set optimizer.lr=2e-4 --set run.name=lr2e-4
  torchrun --no-python --nproc-per-node 8 train --config stage1.yaml        on 8 GPUs
  train --config stage1.yaml --dry-run                             is everything there and does it fit?
  train --config stage1.yaml --resume runs/stage1/checkpoints/step_00001000";

/// How a run that was interrupted behind a checkpoint ends under a launcher, which takes 0 for the end of the work: sysexits' EX_TEMPFAIL.
const GO_ON: u8 = 75;

/// Train the stages that configuration files describe, one after the other
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TrainArguments {
    /// Configuration file of one stage; give it once for each stage
    #[arg(long = "config", value_name = "FILE", required = true)]
    configs: Vec<PathBuf>,
    /// Overrides a key in every file, as optimizer.lr=2e-4
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// auto: go on where the run was; never: refuse a folder that holds a run; else a checkpoint to go on from
    #[arg(long, value_name = "auto|never|PATH", default_value = "auto", value_parser = resume)]
    resume: Resume,
    /// Check configuration, weights and data, run one batch through, write nothing but caches of what is fetched
    #[arg(long)]
    dry_run: bool,
}

fn resume(text: &str) -> Result<Resume, Infallible> {
    Ok(match text {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        path => Resume::Path(path.into()),
    })
}

impl TrainArguments {
    pub(crate) fn run(self) -> Result<ExitCode> {
        if matches!(self.resume, Resume::Path(_)) && self.configs.len() > 1 {
            let message = "--resume PATH: expected a single --config, since a checkpoint belongs to one stage";
            return Err(UsageError(message.into()).into());
        }
        let request = TrainRequest {
            configs: self.configs,
            sets: self.sets,
            resume: self.resume,
            dry_run: self.dry_run,
            hub: hub::from_environment()?,
            shard_cache: shard_cache::folder(),
            output: progress,
            say,
            launch: launch::launch()?,
            abandon,
            git_commit: option_env!("BLIP2_GIT_COMMIT").map(str::to_owned),
        };
        let rank = request.launch.as_ref().map_or(0, |launch| launch.rank);
        let Finished::Interrupted { folder, step } = train::run(&request)? else { return Ok(ExitCode::SUCCESS) };
        // The first rank says it for all.
        if rank == 0 && step == 0 {
            print(format_args!("stopped before the first step"))?;
        } else if rank == 0 {
            let folder = folder.display();
            print(format_args!(
                "stopped after step {step}, checkpoint written to {folder}; the same command goes on from there"
            ))?;
        }
        Ok(if launch::is_launched() { ExitCode::from(GO_ON) } else { ExitCode::SUCCESS })
    }
}

fn progress() -> Output {
    if io::stderr().is_terminal() { Output::Bar } else { Output::Lines(Box::new(io::stderr())) }
}
