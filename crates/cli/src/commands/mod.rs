//! The commands, one file each: parse, resolve, run.

mod bench;
mod cache;
mod config;
mod evaluate;
mod export;
mod generate;
mod inspect;
mod replay;
mod shards;
pub(crate) mod train;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// A command with its arguments.
#[derive(Subcommand)]
pub(crate) enum Command {
    Train(train::TrainArguments),
    Export(export::ExportArguments),
    Generate(generate::GenerateArguments),
    Evaluate(evaluate::EvaluateArguments),
    #[command(subcommand)]
    Shards(shards::ShardsCommand),
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    Config(config::ConfigArguments),
    Inspect(inspect::InspectArguments),
    Replay(replay::ReplayArguments),
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

impl Command {
    /// Does it.
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Command::Train(arguments) => return arguments.run(),
            Command::Export(arguments) => arguments.run(),
            Command::Generate(arguments) => arguments.run(),
            Command::Evaluate(arguments) => arguments.run(),
            Command::Shards(command) => command.run(),
            Command::Cache(command) => command.run(),
            Command::Config(arguments) => arguments.run(),
            Command::Inspect(arguments) => arguments.run(),
            Command::Replay(arguments) => arguments.run(),
            Command::Bench(command) => command.run(),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}
