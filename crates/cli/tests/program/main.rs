//! The programs as their users meet them: arguments in; exit code, standard output and standard error out.

mod bad_input;
mod bad_steps;
mod damage;
mod decoders;
mod encoder_decoder;
mod feature_cache;
mod help;
mod hostile;
mod hub;
mod lavis;
mod mixtures;
#[path = "../../../trainer/tests/hub/model.rs"]
mod model;
mod models;
mod ranks;
mod rerank;
mod resume;
#[path = "../../../trainer/tests/hub/server.rs"]
mod server;
mod shards;
mod tiny_run;
mod towers;
mod training;
mod vqa;
mod weights;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a program did.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn program_command(program: &str) -> Command {
    let mut command = Command::new(program);
    // A backtrace is noise to whoever has set this variable; and threads that wait for each other beside other tests only spin.
    command.env("RUST_BACKTRACE", "1").env("OMP_NUM_THREADS", "1");
    command
}

fn run_program(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    Ended::of(program_command(program).args(arguments).output().unwrap())
}

fn blip2<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    run_program(env!("CARGO_BIN_EXE_blip2"), arguments)
}

impl Ended {
    fn of(output: Output) -> Ended {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Standard output of a success.
    fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// The message of a failure: one line, no panic, nothing on standard output.
    fn failure(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        let message = self.stderr.trim_end_matches('\n').to_string();
        assert!(message.starts_with("error: ") && message.lines().count() == 1, "{message}");
        for noise in ["panicked", "a defect of this program", "backtrace", "frame #"] {
            assert!(!message.contains(noise), "{message}");
        }
        message
    }
}

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case)
}

/// A copy of a golden case's model, to be damaged.
fn copied(case: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(case)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}
