//! `export`: a run or checkpoint as a Hugging Face directory.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::export::export_checkpoint;
use clap::Args;

use crate::hub;
use crate::output::{print, say};

const EXAMPLES: &str = "\
Examples:
  blip2 export --checkpoint runs/stage2 --out model                                    the best checkpoint by checkpoint.best, else the newest
  blip2 export --checkpoint runs/stage2/checkpoints/step_00001000 --out model-1000     this one

The directory loads in transformers: config.json, weights, tokenizer files, image preprocessing. An earlier export at --out is replaced,
anything else there is not.";

/// Write a run's model as a Hugging Face directory
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExportArguments {
    /// Folder of a run or of one of its checkpoints
    #[arg(long, value_name = "DIR|RUN")]
    checkpoint: PathBuf,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl ExportArguments {
    pub(crate) fn run(self) -> Result<()> {
        let exported = export_checkpoint(&self.checkpoint, &self.out, &hub::from_environment()?)?;
        for rejected in &exported.rejected {
            say(&format!("warning: not taken: {}", rejected.reason));
        }
        let (step, checkpoint) = (exported.step, exported.checkpoint.display());
        print(format_args!("{}: the model of step {step} ({checkpoint})", self.out.display()))
    }
}
