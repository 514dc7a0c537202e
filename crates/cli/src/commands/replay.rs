//! `replay`: one step's losses and gradients on a recorded batch.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::config;
use blip2_trainer::ranks;
use blip2_trainer::replay::{ReplayOptions, replay};
use clap::{Args, ValueEnum};

use crate::arguments::{DeviceArgument, Precision};
use crate::hub;
use crate::launch;
use crate::output::{abandon, print};

const EXAMPLES: &str = "\
Examples:
  blip2 replay --model model --task stage1 --batch batch.safetensors --out out.safetensors
  blip2 replay --model runs/stage1/bad_steps/step_00000012/model --task stage1 \\
      --batch runs/stage1/bad_steps/step_00000012/batch.safetensors --out out.safetensors --precision bf16
  torchrun --no-python --nproc-per-node 4 blip2 replay --model runs/stage1/bad_steps/step_00000012/model --task stage1 \\
      --batch runs/stage1/bad_steps/step_00000012/rank_{rank}/batch.safetensors --out out.rank_{rank}.safetensors

The batch file holds pixel_values f32 [B,3,S,S], input_ids and attention_mask i64 [B,L]; stage 1 also takes negative_image_index and
negative_text_index i64 [B], stage 2 needs labels i64 [B,L] (-100: no target). The output file gets the losses and grad/NAME for every
trained parameter. Under torchrun each rank has its batch; {rank} in both paths is replaced by the rank, gradients are means over the ranks.";

/// Run one training step's forward and backward on a recorded batch, dropout off
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ReplayArguments {
    /// Hugging Face directory of the whole model, or its hub id as hf://ORG/NAME
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Which stage's step
    #[arg(long, value_name = "STAGE")]
    task: Stage,
    /// The recorded batch, a safetensors file
    #[arg(long, value_name = "FILE")]
    batch: PathBuf,
    /// The file that gets losses and gradients
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number format of the step
    #[arg(long, value_name = "FORMAT", default_value = "fp32")]
    precision: Precision,
    #[command(flatten)]
    device: DeviceArgument,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stage {
    /// Image-text contrast, matching and generation
    #[value(name = "stage1")]
    One,
    /// Language modelling through the frozen language model
    #[value(name = "stage2")]
    Two,
}

impl ReplayArguments {
    pub(crate) fn run(self) -> Result<()> {
        let launch = launch::launch()?;
        let (rank, local_rank) = launch.as_ref().map_or((0, 0), |launch| (launch.rank, launch.local_rank));
        let options = ReplayOptions {
            model: hub::from_environment()?.model(&self.model)?,
            stage: match self.task {
                Stage::One => config::Stage::One,
                Stage::Two => config::Stage::Two,
            },
            batch: launch::path_of_rank(&self.batch, rank),
            out: launch::path_of_rank(&self.out, rank),
            precision: self.precision.into(),
            device: self.device.select_for(local_rank)?,
        };
        let losses = ranks::together(launch.as_ref(), abandon, |ranks| replay(&options, &**ranks))?;
        for (name, value) in losses {
            print(format_args!("{name} {value}"))?;
        }
        Ok(())
    }
}
