//! Standard output, and how a command ends.

use std::fmt;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use blip2_trainer::ranks::{exit_now, panic_line};
use serde::Serialize;

/// A command line that parses and yet cannot be.
#[derive(Debug)]
pub(crate) struct UsageError(pub(crate) String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Prints one line of the result.
pub(crate) fn print(line: impl fmt::Display) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{}", printable(&line.to_string()))?)
}

/// Prints a value as one line of JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string(value)?)
}

/// Says something that is no result.
pub(crate) fn say(line: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{}", printable(line));
}

/// What files of others say must not steer a terminal.
fn printable(text: &str) -> String {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(steers) {
        return text.to_owned();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// Ends the process where it stands, for a reason that lies outside it. What is left of it may wait for something that never comes.
pub(crate) fn abandon(reason: &str) {
    say(&error_lines(reason));
    exit_now(1);
}

/// Runs a command and tells how it ended: errors go to standard error, a reader that has left is no error.
pub(crate) fn report(command: impl FnOnce() -> anyhow::Result<ExitCode>) -> ExitCode {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(|place| format!(" ({}:{})", place.file(), place.line())).unwrap_or_default();
        say(&format!("error: a defect of this program{place}: {}", panic_line(info.payload())));
    }));
    match panic::catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            say(&error_lines(&chain(&error)));
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// Each mistake of a list is an error of its own; what is indented belongs to the line above.
fn error_lines(text: &str) -> String {
    let mark = |line: &str| if line.starts_with(' ') { line.to_owned() } else { format!("error: {line}") };
    text.lines().map(mark).collect::<Vec<_>>().join("\n")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes, joined by ": "; causes that the message names already are not said again.
fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn causes_are_said_once() {
        let error = Err::<(), _>(anyhow!("disk full")).context("a.bin: cannot be written").unwrap_err();
        assert_eq!(chain(&error), "a.bin: cannot be written: disk full");
        let error = Err::<(), _>(anyhow!("disk full")).context("a.bin: disk full").unwrap_err();
        assert_eq!(chain(&error), "a.bin: disk full");
    }

    #[test]
    fn a_list_of_mistakes_is_a_list_of_errors() {
        assert_eq!(error_lines("a: x\nb: y"), "error: a: x\nerror: b: y");
        assert_eq!(error_lines("2 problems\n  x\n  y"), "error: 2 problems\n  x\n  y");
    }

    #[test]
    fn a_reader_that_has_left_is_recognised_below_a_context() {
        let left = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&anyhow::Error::new(left).context("standard output")));
        assert!(!is_broken_pipe(&anyhow!("broken pipe")));
    }

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(printable("a\u{1b}[31m\u{7}b\r\n\tüber"), "a\\u{1b}[31m\\u{7}b\\r\n\tüber");
    }
}
