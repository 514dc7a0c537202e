//! `bench`: how fast the parts are on this machine.

use anyhow::Result;
use blip2_trainer::bench::{BenchOptions, StepReport, stage1_step};
use clap::{Args, Subcommand};

use crate::arguments::{DeviceArgument, Precision};
use crate::output::{print, print_json};

const EXAMPLES: &str = "\
Examples:
  blip2 bench step --stage 1 --batch 8
  blip2 bench step --stage 1 --batch 64 --precision bf16 --device cuda --steps 50 --json

The model is the paper's: a bert-base Q-Former with 32 queries behind ViT-g's features, dropout on; weights and features are random.
Forward and backward are measured together, the optimizer apart.";

/// Measure the throughput of the parts on this machine
#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    Step(StepArguments),
}

/// Measure a training step behind the frozen image encoder
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct StepArguments {
    /// The stage
    #[arg(long, value_name = "1", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=1))]
    stage: u8,
    /// Samples a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    batch: u32,
    /// Number format of the step
    #[arg(long, value_name = "FORMAT", default_value = "fp32")]
    precision: Precision,
    #[command(flatten)]
    device: DeviceArgument,
    /// Steps measured, of which the median is told
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Width and tokens of ViT-g's features of an image of 224 pixels.
const VIT_G: (i64, i64) = (1408, 257);

impl BenchCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            BenchCommand::Step(arguments) => arguments.run(),
        }
    }
}

impl StepArguments {
    fn run(self) -> Result<()> {
        let report = stage1_step(&BenchOptions {
            batch: self.batch as usize,
            precision: self.precision.into(),
            device: self.device.select()?,
            steps: self.steps as usize,
            dropout: 0.1,
            width: VIT_G.0,
            tokens: VIT_G.1,
        })?;
        if self.json { print_json(&report) } else { print(lines(&report)) }
    }
}

fn lines(report: &StepReport) -> String {
    let StepReport { stage, batch, precision, device, trainable_parameters, .. } = report;
    let StepReport { median_s, forward_s, samples_per_s, optimizer_s, .. } = report;
    let mut text = format!(
        "stage {stage}, batch {batch}, {precision} on {device}: {trainable_parameters} trainable parameters\n\
         {samples_per_s:.2} samples/s: a step takes {median_s:.4} s, of which forward {forward_s:.4} s; the optimizer {optimizer_s:.4} s more"
    );
    if let Some(mib) = report.peak_memory_mib {
        text += &format!("\n{mib:.0} MiB of memory at most");
    }
    text
}
