//! `inspect`: what a file or directory of weights holds.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::inspect;
use clap::Args;

use crate::output::{print, print_json};

const EXAMPLES: &str = "\
Examples:
  blip2 inspect model                                          a Hugging Face directory
  blip2 inspect runs/stage1/checkpoints/step_00001000          a checkpoint
  blip2 inspect model/model.safetensors --json                 one file
  blip2 inspect checkpoint_9.pth                               one of PyTorch, LAVIS' too

Only headers are read, and nothing of a PyTorch file's pickle is executed.";

/// Tell what a checkpoint, a model directory, a safetensors or a PyTorch file holds
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct InspectArguments {
    /// A checkpoint, a Hugging Face directory, a safetensors or a PyTorch file
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl InspectArguments {
    pub(crate) fn run(self) -> Result<()> {
        let found = inspect(&self.path)?;
        if self.json { print_json(&found) } else { print(found) }
    }
}
