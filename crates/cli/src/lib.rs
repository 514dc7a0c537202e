//! The programs `blip2` and `train`: arguments are parsed and resolved, one function of the trainer does the work, its result is printed.
//!
//! Results go to standard output, progress and warnings to standard error. A failure is `error: ...` and exit code 1, a wrong command
//! line exit code 2; a training that a signal interrupted ends with 75 where a launcher has to start it again.

mod arguments;
mod commands;
mod hub;
mod launch;
mod output;
mod progress;
mod shard_cache;

use std::process::ExitCode;

use clap::Parser;

use commands::{Command, train::TrainArguments};

/// Two-stage pre-training of a vision-language bridge (BLIP-2) between a frozen image encoder and a frozen language model.
#[derive(Parser)]
#[command(name = "blip2", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Blip2 {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  blip2 shards pack --captions pairs.jsonl --out shards     a folder of pictures and captions becomes shards
  blip2 train --config stage1.yaml --config stage2.yaml     both stages, one after the other
  blip2 export --checkpoint runs/stage2 --out model         a directory that transformers loads
  blip2 generate --model model --image picture.jpg          a caption

blip2 COMMAND --help shows the options and examples of a command.";

/// Trains the stages that configuration files describe, one after the other.
#[derive(Parser)]
#[command(name = "train", version, arg_required_else_help = true, after_help = commands::train::EXAMPLES)]
struct Train {
    #[command(flatten)]
    arguments: TrainArguments,
}

/// Runs `blip2` with this process's arguments.
pub fn blip2() -> ExitCode {
    let command = Blip2::parse().command;
    output::report(|| command.run())
}

/// Runs `train` with this process's arguments.
pub fn train() -> ExitCode {
    let arguments = Train::parse().arguments;
    output::report(|| arguments.run())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_lines_are_consistent() {
        Blip2::command().debug_assert();
        Train::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_with_examples() {
        let mut program = Blip2::command();
        program.build();
        let mut commands = vec![(program, "blip2".to_owned()), (Train::command(), "train".to_owned())];
        let mut seen = Vec::new();
        while let Some((mut command, name)) = commands.pop() {
            let help = command.render_long_help().to_string();
            assert!(help.contains(&format!("Usage: {name}")), "{name}: {help}");
            let (_, examples) = help.split_once("Examples:\n").unwrap_or_else(|| panic!("{name} has no examples"));
            let trains = name == "blip2 train";
            assert!(examples.contains(if trains { "train --config" } else { &name }), "{name}: {examples}");
            let below = command.get_subcommands().filter(|command| command.get_name() != "help");
            commands.extend(below.map(|command| (command.clone(), format!("{name} {}", command.get_name()))));
            seen.push(name);
        }
        assert!(seen.len() > 20 && seen.contains(&"blip2 shards pack".to_owned()), "{seen:?}");
    }
}
