//! `export`: a run or checkpoint as a Hugging Face directory, or as a file of LAVIS.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::export::{FrozenTowers, export_checkpoint, export_lavis};
use clap::{Args, ValueEnum};

use crate::hub;
use crate::output::{print, say};

const EXAMPLES: &str = "\
Examples:
  blip2 export --checkpoint runs/stage2 --out model                                    the best checkpoint by checkpoint.best, else the newest
  blip2 export --checkpoint runs/stage2/checkpoints/step_00001000 --out model-1000     this one
  blip2 export --checkpoint runs/stage2 --trained-only --out bridge                    without copies of the frozen towers
  blip2 export --checkpoint runs/stage1 --format lavis --out stage1.pth                what was trained, with LAVIS' names

The directory loads in transformers: config.json, weights, tokenizer files, image preprocessing. A further line says what transformers cannot do
with it; it has no class for any image encoder but BLIP-2's own. An earlier export at --out is replaced, anything else
there is not. LAVIS' file holds no frozen towers, as LAVIS saves it, and replaces nothing.";

/// Write a run's model as a Hugging Face directory or as a checkpoint of LAVIS
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExportArguments {
    /// Folder of a run or of one of its checkpoints
    #[arg(long, value_name = "DIR|RUN")]
    checkpoint: PathBuf,
    /// What to write: a directory, with --format lavis a .pth file
    #[arg(long, value_name = "DIR|FILE")]
    out: PathBuf,
    /// The layout
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// Write what was trained alone, and name the frozen towers by folder or hub id and digest; every command here completes it from there
    #[arg(long, conflicts_with = "format")]
    trained_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Hugging Face directory with everything in it
    Hf,
    /// A .pth as LAVIS saves it
    Lavis,
}

impl ExportArguments {
    pub(crate) fn run(self) -> Result<()> {
        let towers = if self.trained_only { FrozenTowers::Named } else { FrozenTowers::Copied };
        let exported = match self.format {
            Format::Hf => export_checkpoint(&self.checkpoint, &self.out, towers, &hub::from_environment()?)?,
            Format::Lavis => export_lavis(&self.checkpoint, &self.out)?,
        };
        for rejected in &exported.rejected {
            say(&format!("warning: not taken: {}", rejected.reason));
        }
        let (step, checkpoint) = (exported.step, exported.checkpoint.display());
        let out = self.out.display();
        print(format_args!("{out}: the model of step {step} ({checkpoint})"))?;
        exported.remarks.iter().try_for_each(|remark| print(format_args!("{out}: {remark}")))
    }
}
