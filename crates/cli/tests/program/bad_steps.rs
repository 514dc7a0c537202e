//! Steps whose numbers are not finite: recorded for `replay`, skipped, and too many in a row end the run.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::blip2;
use crate::tiny_run::{TinyRun, checkpoint, json_lines, refused, train};

/// Step 0 is good and throws the weights so far away that no later one is.
fn absurd(steps: u64) -> [(&'static str, Value); 6] {
    [
        ("/optimizer/lr", json!(1e30)),
        ("/optimizer/min_lr", json!(1e30)),
        ("/optimizer/warmup_start_lr", json!(1e30)),
        ("/schedule/steps", json!(steps)),
        ("/checkpoint/every", json!(100)),
        ("/eval/every", json!(100)),
    ]
}

fn records(tiny: &TinyRun, run: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(tiny.run(run).join("bad_steps")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

fn replay(folder: &std::path::Path, stage: &str) -> String {
    let (model, batch, out) = (folder.join("model"), folder.join("batch.safetensors"), folder.join("out.safetensors"));
    let arguments = ["replay".as_ref(), "--task".as_ref(), stage.as_ref(), "--device".as_ref(), "cpu".as_ref()];
    let paths = [("--model", &model), ("--batch", &batch), ("--out", &out)];
    let paths = paths.iter().flat_map(|(option, path)| [OsStr::new(option), path.as_os_str()]);
    blip2(arguments.into_iter().chain(paths)).success()
}

#[test]
fn ten_in_a_row_end_the_run_and_each_can_be_replayed() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &absurd(20));
    // The second time there are records already.
    for _ in 0..2 {
        let message = refused(train(&config, &[]));
        for part in ["10 steps in a row were not finite, the last at step 10", "bad_steps", "blip2 replay"] {
            assert!(message.contains(part), "{message}");
        }
    }
    let folders = records(&tiny, "a");
    let names: Vec<_> = folders.iter().map(|folder| folder.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, (1..=10).map(|step| format!("step_{step:08}")).collect::<Vec<_>>());
    let model: Value = serde_json::from_slice(&fs::read(folders[0].join("model/config.json")).unwrap()).unwrap();
    assert!(model["frozen_weights"]["vision"].is_object(), "without a copy of the towers: {model}");
    let weights: Vec<_> = folders.iter().map(|f| fs::read(f.join("model/model.safetensors")).unwrap()).collect();
    assert!(weights.iter().all(|bytes| *bytes == weights[0]), "a bad step changes nothing");
    let batches: Vec<_> = folders.iter().map(|f| fs::read(f.join("batch.safetensors")).unwrap()).collect();
    assert_ne!(batches[0], batches[1]);
    let printed = replay(&folders[9], "stage1");
    let loss: f64 = printed.lines().find_map(|line| line.strip_prefix("loss ")).unwrap().parse().unwrap();
    assert!(!loss.is_finite(), "{printed}");
}

#[test]
fn fewer_are_skipped_and_the_run_ends_with_a_checkpoint() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    let config = tiny.stage2("a", "stage1", &absurd(4));
    let ended = train(&config, &[]);
    assert!(ended.stderr.contains("step 3: not finite, skipped; recorded in "), "{}", ended.stderr);
    ended.success();
    assert_eq!(records(&tiny, "a").len(), 3);
    let logged: Vec<Value> = json_lines(&tiny.run("a").join("metrics.jsonl"));
    assert!(logged.iter().all(|record| record["step"] == 1), "a bad step is no part of a mean: {logged:?}");
    assert!(checkpoint(&tiny.run("a"), 4).join("MANIFEST.json").exists());
    assert!(replay(&records(&tiny, "a")[0], "stage2").starts_with("loss "));

    // Where features come from a cache, the record has the pixels all the same.
    let mut changes = absurd(4).to_vec();
    changes.push(("/data/feature_cache", json!(tiny.path("cache"))));
    train(&tiny.stage2("cached", "stage1", &changes), &[]).success();
    let batch = |run: &str| fs::read(records(&tiny, run)[2].join("batch.safetensors")).unwrap();
    assert!(batch("cached") == batch("a"));
}
