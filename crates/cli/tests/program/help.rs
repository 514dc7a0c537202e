//! `--help` and wrong command lines.

use std::fs;
use std::path::Path;

use crate::{blip2, run_program};

#[test]
fn help_goes_to_standard_output() {
    let help = blip2(["shards", "pack", "--help"]).success();
    assert!(help.contains("Usage: blip2 shards pack") && help.contains("Examples:\n"), "{help}");
}

#[test]
fn the_page_of_the_keys_is_what_the_program_prints() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/config.md")).unwrap();
    let printed = blip2(["config", "--reference"]).success();
    let first = printed.lines().zip(page.lines()).find(|(printed, written)| printed != written);
    assert!(printed == page, "blip2 config --reference > docs/config.md; printed and written: {first:?}");
}

#[test]
fn train_is_blip2_train() {
    let options = |help: String| {
        help.split_once("Options:").unwrap().1.replace("  -V, --version\n          Print version\n\n", "")
    };
    let alone = options(run_program(env!("CARGO_BIN_EXE_train"), ["--help"]).success());
    let below = options(blip2(["train", "--help"]).success());
    for option in ["--config", "--set", "--resume", "--dry-run"] {
        assert!(alone.contains(option) && below.contains(option), "{option}");
    }
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    let wrong: [&[&str]; 9] = [
        &["no-such-command"],
        &["train"],
        &["generate", "--model", "m", "--image", "a", "--top-p", "1.5"],
        &["generate", "--model", "m", "--image", "a", "--num-beams", "0"],
        &["generate", "--model", "m", "--image", "a", "--num-beams", "2", "--early-stopping", "maybe"],
        &["generate", "--model", "m", "--image", "a", "--num-beams", "3", "--seed", "1"],
        &["generate", "--model", "m", "--image", "a", "--prompt", "x", "--prompt", "y"],
        &["train", "--config", "a", "--config", "b", "--resume", "c"],
        &["replay", "--model", "m", "--task", "stage3", "--batch", "b", "--out", "o"],
    ];
    for arguments in wrong {
        let ended = blip2(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.starts_with("error: ") && ended.stdout.is_empty(), "{arguments:?}: {}", ended.stderr);
    }
}
