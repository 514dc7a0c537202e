//! A run that is interrupted, however it is, ends as one that was not: the same bytes, the same records.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::Ended;
use crate::tiny_run::{TinyRun, assert_same_end, checkpoint, metrics, recorded_step, runs_until, start, train};

const STEPS: u64 = 24;

/// What may go wrong on resumption is all there: dropout, augmentation, accumulation, checkpoints between two records.
pub fn changes() -> [(&'static str, Value); 9] {
    [
        ("/model/qformer/dropout", json!(0.1)),
        ("/data/image/augment", json!("crop_flip")),
        ("/data/feature_cache", json!("off")),
        ("/schedule/micro_batch", json!(2)),
        ("/schedule/steps", json!(STEPS)),
        ("/checkpoint/every", json!(3)),
        ("/log/every", json!(2)),
        ("/optimizer/clip_norm", json!(1.0)),
        ("/eval/every", json!(12)),
    ]
}

/// A small generator of our own, so that a failure can be had again from its seed.
pub struct Random(pub u64);

impl Random {
    /// From 0 to below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end.max(1)
    }

    /// From 0 to below 1.
    fn share(&mut self) -> f64 {
        self.below(1000) as f64 / 1000.0
    }
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "it had ended by itself");
}

/// How long a run takes until its first record, and for a step from then on.
pub struct Pace {
    start_s: f64,
    step_s: f64,
}

/// Trains to the end, and says how long that takes.
pub fn pace_of(config: &Path, run: &Path) -> Pace {
    let begun = Instant::now();
    let mut child = start(config);
    runs_until(&mut child, || recorded_step(run) > 0);
    let start_s = begun.elapsed().as_secs_f64();
    Ended::of(child.wait_with_output().unwrap()).success();
    Pace { start_s, step_s: (begun.elapsed().as_secs_f64() - start_s) / STEPS as f64 }
}

/// Kills the run `kills` times, each later in its course than the one before, at any moment of a step, and every fourth
/// while it starts; then lets it end.
pub fn run_with_kills(config: &Path, run: &Path, kills: u64, pace: &Pace, random: &mut Random) {
    for nth in 0..kills {
        let mut child = start(config);
        if nth % 4 == 3 {
            thread::sleep(Duration::from_secs_f64(pace.start_s * random.share()));
        } else {
            let (from, to) = ((STEPS - 2) * nth / kills, (STEPS - 2) * (nth + 1) / kills);
            let step = from + random.below(to - from);
            assert!(runs_until(&mut child, || recorded_step(run) >= step), "it ended before step {step}");
            thread::sleep(Duration::from_secs_f64(pace.step_s * random.share()));
        }
        kill(child);
    }
    train(config, &[]).success();
}

#[test]
fn killed_at_random_moments_stage_1_ends_in_the_same_bytes() {
    let tiny = TinyRun::new();
    let (whole, killed) = (tiny.stage1("whole", &changes()), tiny.stage1("killed", &changes()));
    let pace = pace_of(&whole, &tiny.run("whole"));
    let kills = std::env::var("BLIP2_KILLS").map_or(5, |kills| kills.parse().unwrap());
    run_with_kills(&killed, &tiny.run("killed"), kills, &pace, &mut Random(3));
    assert_same_end(&tiny.run("killed"), &tiny.run("whole"), STEPS);
    let steps: Vec<u64> = metrics(&tiny.run("killed"))
        .iter()
        .filter(|record| record.get("loss").is_some())
        .map(|record| record["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=STEPS / 2).map(|n| 2 * n).collect::<Vec<_>>(), "every second step is recorded once");
}

#[test]
fn killed_in_bf16_stage_2_ends_in_the_same_bytes() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    let mut changes = changes().to_vec();
    changes.push(("/run/precision", json!("bf16")));
    let (whole, killed) = (tiny.stage2("whole", "stage1", &changes), tiny.stage2("killed", "stage1", &changes));
    let pace = pace_of(&whole, &tiny.run("whole"));
    let kills = std::env::var("BLIP2_KILLS").map_or(1, |kills| kills.parse().unwrap());
    run_with_kills(&killed, &tiny.run("killed"), kills, &pace, &mut Random(5));
    assert_same_end(&tiny.run("killed"), &tiny.run("whole"), STEPS);
}

#[test]
fn sigterm_ends_behind_the_step_with_a_checkpoint_and_the_same_command_goes_on() {
    let tiny = TinyRun::new();
    let (whole, stopped) = (tiny.stage1("whole", &changes()), tiny.stage1("stopped", &changes()));
    train(&whole, &[]).success();

    let run = tiny.run("stopped");
    let mut child = start(&stopped);
    assert!(runs_until(&mut child, || recorded_step(&run) >= 4));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let said = Ended::of(child.wait_with_output().unwrap()).success();
    let step: u64 = said.strip_prefix("stopped after step ").unwrap().split_once(',').unwrap().0.parse().unwrap();
    assert!((4..STEPS).contains(&step), "{said}");
    assert!(said.contains(run.to_str().unwrap()) && said.contains("the same command goes on from there"), "{said}");
    assert!(checkpoint(&run, step).join("MANIFEST.json").exists());
    assert!(!run.join("finished").exists());

    let ended = train(&stopped, &[]);
    assert!(ended.stderr.contains(&format!("going on from step {step}")), "{}", ended.stderr);
    ended.success();
    assert_same_end(&run, &tiny.run("whole"), STEPS);
}

/// Stops a run behind its fourth step or later; the step.
fn stop_at_some_step(config: &Path, run: &Path) -> u64 {
    let mut child = start(config);
    assert!(runs_until(&mut child, || recorded_step(run) >= 4));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let said = Ended::of(child.wait_with_output().unwrap()).success();
    said.strip_prefix("stopped after step ").unwrap().split_once(',').unwrap().0.parse().unwrap()
}

/// The steps at which a run has recorded an evaluation.
fn evaluated(run: &Path) -> Vec<u64> {
    let records = metrics(run).into_iter().filter(|record| record.get("val_loss").is_some());
    records.map(|record| record["step"].as_u64().unwrap()).collect()
}

fn checkpoints(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_evaluation_that_a_signal_came_before_is_made_when_the_run_goes_on() {
    let tiny = TinyRun::new();
    // Whenever a signal comes, an evaluation is due.
    let always = [("/eval/every", json!(1)), ("/checkpoint/best", json!("retrieval_r1"))];
    let changes = [&changes()[..], &always].concat();
    let (whole, stopped) = (tiny.stage1("whole", &changes), tiny.stage1("stopped", &changes));
    train(&whole, &[]).success();
    let run = tiny.run("stopped");
    let step = stop_at_some_step(&stopped, &run);
    assert_eq!(evaluated(&run), (1..step).collect::<Vec<_>>(), "a signal is not kept waiting by an evaluation");
    train(&stopped, &[]).success();
    assert_same_end(&run, &tiny.run("whole"), STEPS);
    assert_eq!(checkpoints(&run), checkpoints(&tiny.run("whole")));

    // Where nothing but the evaluation is left to do, as behind a signal in the last step.
    let run = tiny.run("last");
    let step = stop_at_some_step(&tiny.stage1("last", &changes), &run);
    let last = tiny.stage1("last", &[&changes[..], &[("/schedule/steps", json!(step))]].concat());
    train(&last, &[]).success();
    assert!(run.join("finished").exists());
    assert_eq!(evaluated(&run), (1..=step).collect::<Vec<_>>());
}

#[test]
fn an_evaluation_that_a_signal_comes_into_ends_and_is_made_when_the_run_goes_on() {
    let tiny = TinyRun::new();
    tiny.pack(&tiny.path("held_out"), 600);
    let held_out = [("/eval/every", json!(2)), ("/schedule/steps", json!(4)), ("/log/every", json!(1))];
    let shards = ("/data/val", json!({"shards": tiny.path("held_out/*.tar")}));
    let changes = [&changes()[..], &held_out, &[shards]].concat();
    let (whole, stopped) = (tiny.stage1("whole", &changes), tiny.stage1("stopped", &changes));
    train(&whole, &[]).success();

    let run = tiny.run("stopped");
    let mut child = start(&stopped);
    // The record is written before the evaluation, which takes hundreds of batches.
    assert!(runs_until(&mut child, || recorded_step(&run) == 2));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let said = Ended::of(child.wait_with_output().unwrap()).success();
    assert!(said.starts_with("stopped after step 2,"), "{said}");
    assert!(evaluated(&run).is_empty());
    assert!(checkpoint(&run, 2).join("MANIFEST.json").exists(), "nothing is lost");

    train(&stopped, &[]).success();
    assert_eq!(evaluated(&run), [2, 4]);
    assert_same_end(&run, &tiny.run("whole"), 4);
}
