//! `config`: what may stand in a configuration file.

use anyhow::Result;
use blip2_trainer::config::Config;
use clap::Args;

use crate::output::print;

const EXAMPLES: &str = "\
Examples:
  blip2 config --reference                       every key: docs/config.md
  blip2 config --reference | grep -i warmup      keys by what they are about";

/// Tell what may stand in a configuration file
#[derive(Args)]
#[command(arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct ConfigArguments {
    /// Print every key with what it takes, its default and what it is for, as Markdown
    #[arg(long)]
    reference: bool,
}

impl ConfigArguments {
    pub(crate) fn run(self) -> Result<()> {
        if self.reference {
            print(Config::reference())?;
        }
        Ok(())
    }
}
