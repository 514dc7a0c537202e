//! `inspect`: what a file or directory of weights holds.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::fit::{FitTable, PartFit, fit};
use blip2_trainer::{Inspection, inspect};
use clap::Args;
use serde::Serialize;

use crate::hub;
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
    /// A checkpoint, a Hugging Face directory or hub id (hf://ORG/NAME), a safetensors or a PyTorch file
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    found: Inspection,
    /// How each part fits a model of its configuration; left out for what is no model.
    #[serde(skip_serializing_if = "Option::is_none")]
    parts: Option<Vec<PartFit>>,
}

impl InspectArguments {
    pub(crate) fn run(self) -> Result<()> {
        let path = hub::from_environment()?.folder(&self.path)?;
        let found = inspect(&path)?;
        if self.json {
            let parts = fit(&path)?;
            return print_json(&Report { found, parts });
        }
        print(found)?;
        match fit(&path)? {
            Some(parts) => print(format_args!("\n{}", FitTable(&parts))),
            None => Ok(()),
        }
    }
}
