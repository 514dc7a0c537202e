//! A run that is killed, stopped or damaged ends with the same bytes as one that never was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::run_program;
use crate::setup::{init, write_config, write_shards};

const STEPS: u64 = 24;
/// Dropout is on by default; augmentation and accumulation are too here, and a loss of every step is logged.
const SETS: [&str; 7] = [
    "data.image.augment=crop_flip",
    "schedule.steps=24",
    "schedule.micro_batch=2",
    "checkpoint.every=3",
    "eval.every=24",
    "optimizer.clip_norm=1",
    "run.precision=bf16",
];

/// A folder with shards, a model to start from and a configuration.
struct World {
    folder: tempfile::TempDir,
    _init: tempfile::TempDir,
    config: PathBuf,
}

impl World {
    fn new() -> World {
        let (folder, init) = (tempfile::tempdir().unwrap(), init());
        write_shards(folder.path());
        let config = write_config(folder.path(), 1, init.path());
        World { folder, _init: init, config }
    }

    fn arguments(&self, name: &str, more: &[&str]) -> Vec<String> {
        let name = format!("run.name={name}");
        let mut arguments = vec!["--config".to_string(), self.config.display().to_string()];
        for set in SETS.iter().chain(more).chain([&name.as_str()]) {
            arguments.extend(["--set".to_string(), set.to_string()]);
        }
        arguments
    }

    fn spawn(&self, name: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_train"))
            .args(self.arguments(name, &[]))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn finish(&self, name: &str) -> String {
        let ended = run_program(env!("CARGO_BIN_EXE_train"), self.arguments(name, &[]));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stderr
    }

    fn checkpoint(&self, name: &str, step: u64) -> PathBuf {
        self.run(name).join(format!("checkpoints/step_{step:08}"))
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join("runs").join(name)
    }

    /// Asserts that two runs ended alike: weights, moments, and the record of every step.
    fn assert_same_end(&self, one: &str, other: &str) {
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read = |name: &str| fs::read(self.checkpoint(name, STEPS).join(file)).unwrap();
            assert!(read(one) == read(other), "{file} differs between {one} and {other}");
        }
        assert_eq!(losses(&self.run(one)), losses(&self.run(other)));
    }
}

/// `(step, loss)` of every training record, in order.
fn losses(run: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter_map(|r| Some((r["step"].as_u64()?, r["loss"].as_f64()?))).collect()
}

/// Milliseconds that look random and are the same every time (a linear congruential generator).
fn moments(count: u64) -> impl Iterator<Item = Duration> {
    let mut state = 12_345u64;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis(250 + (state >> 33) % 900)
    })
}

/// `BLIP2_KILLS=20` asks for more kills than a quick test has.
#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bytes() {
    let kills = std::env::var("BLIP2_KILLS").map_or(4, |kills| kills.parse().unwrap());
    let world = World::new();
    world.finish("whole");
    assert_eq!(losses(&world.run("whole")).len() as u64, STEPS);
    let mut killed = 0;
    for moment in moments(kills) {
        let mut child = world.spawn("killed");
        sleep(moment);
        child.kill().unwrap(); // SIGKILL
        killed += u64::from(!child.wait().unwrap().success());
        if world.run("killed").join("finished").exists() {
            // Begin anew, so that every kill hits a run at work.
            world.assert_same_end("whole", "killed");
            fs::remove_dir_all(world.run("killed")).unwrap();
        }
    }
    assert!(killed > 0);
    world.finish("killed");
    world.assert_same_end("whole", "killed");
}

#[test]
fn sigterm_writes_a_checkpoint_and_the_same_command_goes_on() {
    let world = World::new();
    world.finish("whole");
    let child = Command::new(env!("CARGO_BIN_EXE_train"))
        .args(world.arguments("stopped", &[]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while losses_so_far(&world.run("stopped")) < 2 {
        sleep(Duration::from_millis(20));
    }
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("the same command goes on"), "{said}");
    let step = losses_so_far(&world.run("stopped")) as u64;
    assert!(world.checkpoint("stopped", step).exists(), "a checkpoint of step {step}: {said}");
    world.finish("stopped");
    world.assert_same_end("whole", "stopped");
}

fn losses_so_far(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.matches("\"loss\"").count())
}

#[test]
fn a_damaged_newest_checkpoint_is_said_and_the_one_before_is_taken() {
    let world = World::new();
    world.finish("whole");
    world.finish("damaged");
    let newest = world.checkpoint("damaged", STEPS).join("model.safetensors");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();
    fs::remove_file(world.run("damaged").join("finished")).unwrap();
    let said = world.finish("damaged");
    assert!(said.contains("step_00000024") && said.contains("damaged, the one before is taken"), "{said}");
    assert!(said.contains("going on from step 21"), "{said}");
    world.assert_same_end("whole", "damaged");
}

#[test]
fn a_folder_in_use_or_of_another_configuration_is_refused() {
    let world = World::new();
    world.finish("mine");
    let other = run_program(env!("CARGO_BIN_EXE_train"), world.arguments("mine", &["optimizer.lr=2e-3", "schedule.steps=30"]));
    let message = other.failure_of_training();
    assert!(message.contains("optimizer.lr") && message.contains("0.002"), "{message}");

    let mut child = world.spawn("busy");
    while losses_so_far(&world.run("busy")) < 1 {
        sleep(Duration::from_millis(10));
    }
    let second = run_program(env!("CARGO_BIN_EXE_train"), world.arguments("busy", &[]));
    child.kill().unwrap();
    child.wait().unwrap();
    let message = second.failure_of_training();
    assert!(message.contains("busy") && message.contains("process"), "{message}");
}

#[test]
fn more_steps_continue_a_finished_run() {
    let world = World::new();
    world.finish("longer");
    let ended = run_program(env!("CARGO_BIN_EXE_train"), world.arguments("longer", &["schedule.steps=27"]));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("going on from step 24"), "{}", ended.stderr);
    assert!(world.checkpoint("longer", 27).exists());
}

impl crate::Ended {
    /// The last line of a training that was refused.
    fn failure_of_training(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self.stderr.lines().last().unwrap_or_default().to_string()
    }
}
