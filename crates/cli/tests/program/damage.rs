//! Run folders that are damaged, in use, or another run's.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::tiny_run::{
    TinyRun, assert_same_end, checkpoint, checkpoint_bytes, metrics, recorded_step, refused, runs_until, start, train,
};
use crate::{blip2, copied};

/// Steps of a run here, with a checkpoint every second one.
const STEPS: u64 = 4;

fn flip_a_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

#[test]
fn of_a_damaged_newest_checkpoint_the_one_before_is_taken() {
    let tiny = TinyRun::new();
    let (whole, damaged) = (tiny.stage1("whole", &[]), tiny.stage1("damaged", &[]));
    train(&whole, &[]).success();
    train(&damaged, &[]).success();
    let run = tiny.run("damaged");
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("model.safetensors", flip_a_byte),
        ("optimizer.safetensors", truncate),
        ("state.json", flip_a_byte),
        ("MANIFEST.json", truncate),
    ];
    for (name, damage) in damages {
        // As after a crash just before the end.
        fs::remove_file(run.join("finished")).unwrap();
        damage(&checkpoint(&run, STEPS).join(name));
        let ended = train(&damaged, &[]);
        for said in ["step_00000004: damaged, passed over: ", name, "going on from step 2"] {
            assert!(ended.stderr.contains(said), "{said} is not in {}", ended.stderr);
        }
        ended.success();
        assert_same_end(&run, &tiny.run("whole"), STEPS);
    }

    // With no whole checkpoint left the run begins anew, and says why.
    fs::remove_file(run.join("finished")).unwrap();
    for step in [2, STEPS] {
        truncate(&checkpoint(&run, step).join("model.safetensors"));
    }
    let ended = train(&damaged, &[]);
    assert_eq!(ended.stderr.matches(": damaged, ").count(), 2, "{}", ended.stderr);
    assert!(ended.stderr.contains("no whole checkpoint is left: the run begins anew"), "{}", ended.stderr);
    ended.success();
    assert_same_end(&run, &tiny.run("whole"), STEPS);
}

#[test]
fn a_damaged_checkpoint_does_not_take_the_place_of_new_ones() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &[("/checkpoint/keep", json!(1))]);
    train(&config, &[]).success();
    let run = tiny.run("a");
    fs::remove_file(run.join("finished")).unwrap();
    truncate(&checkpoint(&run, STEPS).join("model.safetensors"));
    // It ends before the step of the damaged one.
    train(&config, &["--set", "schedule.steps=2"]).success();
    assert!(checkpoint(&run, 2).exists(), "the newest one that is whole");
    let ended = train(&config, &[]);
    assert!(ended.stderr.contains("going on from step 2"), "{}", ended.stderr);
    ended.success();
}

#[test]
fn damage_in_what_the_q_former_begins_from_is_told() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[]), &[]).success();
    let newest = checkpoint(&tiny.run("stage1"), STEPS);
    let stage2 = |name: &str, init: &Path| tiny.stage2(name, "stage1", &[("/model/qformer/init", json!(init))]);
    flip_a_byte(&newest.join("model.safetensors"));
    let message = refused(train(&stage2("from_damaged", &newest), &[]));
    assert!(message.contains("model.safetensors: expected blake3"), "{message}");
    let ended = train(&tiny.stage2("from_older", "stage1", &[]), &[]);
    let warning = "warning: model.qformer.init: ";
    assert!(ended.stderr.contains(warning) && ended.stderr.contains("step_00000004 is damaged"), "{}", ended.stderr);
    ended.success();
    assert!(!train(&tiny.stage2("from_finished", "stage1", &[]), &[]).stderr.contains("is not finished"));
    fs::remove_file(tiny.run("stage1").join("finished")).unwrap();
    let ended = train(&tiny.stage2("from_unfinished", "stage1", &[]), &[]);
    let warning = format!("the run {} is not finished; ", tiny.run("stage1").display());
    assert!(ended.stderr.contains(&warning) && ended.stderr.contains("step_00000002 is taken"), "{}", ended.stderr);
    flip_a_byte(&checkpoint(&tiny.run("stage1"), 2).join("model.safetensors"));
    let message = refused(train(&tiny.stage2("from_none", "stage1", &[]), &[]));
    assert!(message.contains("every checkpoint of this run is damaged; the newest: "), "{message}");
}

#[test]
fn shards_may_move_but_not_change() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &[]);
    train(&config, &[]).success();
    let (moved, other) = (tiny.path("moved"), tiny.path("other"));
    for folder in [&moved, &other] {
        fs::create_dir(folder).unwrap();
        fs::copy(tiny.path("shards/00000.tar"), folder.join("00000.tar")).unwrap();
    }
    // The name in the first header: another key, so another set.
    let mut shard = fs::read(other.join("00000.tar")).unwrap();
    let name = shard.iter().position(|&byte| byte == b'.').unwrap();
    shard[name - 1] = b'x';
    let sum: u32 = (0..512).map(|i| if (148..156).contains(&i) { 32 } else { u32::from(shard[i]) }).sum();
    shard[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    fs::write(other.join("00000.tar"), shard).unwrap();
    for (key, said) in
        [("data.train.0.shards", "data.train: other shards"), ("data.val.shards", "data.val: other shards")]
    {
        let at = |folder: &Path| format!("{key}={}/*.tar", folder.display());
        // Whether the run is finished or not, and before weights are read.
        let ended = train(&config, &["--set", &at(&other)]);
        assert!(!ended.stderr.contains("loading models"), "{}", ended.stderr);
        let message = refused(ended);
        assert!(message.contains(said), "{message}");
        let ended = train(&config, &["--set", &at(&moved)]);
        assert!(ended.stderr.contains("going on from step 4"), "{}", ended.stderr);
        ended.success();
    }
    train(&config, &[]).success();
}

#[test]
fn weights_of_a_tower_that_were_exchanged_are_told() {
    let (tiny, tower) = (TinyRun::new(), copied("stage1"));
    let config = tiny.stage1("a", &[("/model/vision/weights", json!(tower.path()))]);
    train(&config, &[]).success();
    let weights = tower.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&whole[8..header_end]).unwrap();
    let begin = header["vision_model.embeddings.position_embedding"]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut other = whole.clone();
    other[header_end + begin] ^= 1;
    fs::write(&weights, other).unwrap();
    let expected = "model.vision.weights: expected the weights that the run began with, got others; put them back";
    let message = refused(train(&config, &["--set", "schedule.steps=6"]));
    assert!(message.contains(expected), "{message}");
    let evaluate = || blip2(["evaluate", "--task", "retrieval", "--config", config.to_str().unwrap()]);
    assert!(evaluate().failure().contains(expected));

    fs::write(&weights, whole).unwrap();
    evaluate().success();
    train(&config, &["--set", "schedule.steps=6"]).success();
}

#[test]
fn two_runs_in_one_folder_at_once_are_refused() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &[("/schedule/steps", json!(100_000))]);
    let mut first = start(&config);
    assert!(runs_until(&mut first, || recorded_step(&tiny.run("a")) > 0));
    let message = refused(train(&config, &[]));
    let holder = format!("in use by process {} on ", first.id());
    assert!(message.contains(tiny.run("a").to_str().unwrap()) && message.contains(&holder), "{message}");
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(recorded_step(&tiny.run("a")) > 0, "the refused one left the records alone");
}

#[test]
fn a_folder_takes_its_own_configuration_only_and_a_longer_schedule() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &[]);
    train(&config, &[]).success();
    let run = tiny.run("a");
    let before = (checkpoint_bytes(&run, STEPS), fs::read(run.join("config.yaml")).unwrap());
    let difference = "(optimizer.lr: 0.001 in the run, 0.0005 here)";
    let other = ["--set", "optimizer.lr=5e-4"];
    let message = refused(train(&config, &other));
    assert!(message.contains(difference) && message.contains("run.name"), "finished: {message}");
    let message = refused(train(&config, &[&other[..], &["--set", "schedule.steps=6"]].concat()));
    assert!(message.contains(difference) && !message.contains("schedule.steps"), "unfinished: {message}");
    let message = refused(train(&config, &["--resume", "never"]));
    assert!(message.contains("holds a run already"), "{message}");
    assert_eq!((checkpoint_bytes(&run, STEPS), fs::read(run.join("config.yaml")).unwrap()), before);

    let ended = train(&config, &["--set", "schedule.steps=6", "--set", "log.every=2"]);
    assert!(ended.stderr.contains("going on from step 4"), "{}", ended.stderr);
    ended.success();
    let steps: Vec<_> = metrics(&run).iter().filter(|r| r.get("loss").is_some()).map(|r| r["step"].clone()).collect();
    assert_eq!(steps, [1, 2, 3, 4, 6]);
    assert!(checkpoint(&run, 6).exists());
    assert!(train(&config, &[]).stderr.contains("finished already"));
}

#[test]
fn resuming_from_a_checkpoint_that_is_named() {
    let tiny = TinyRun::new();
    let (whole, again) = (tiny.stage1("whole", &[]), tiny.stage1("again", &[]));
    train(&whole, &[]).success();
    train(&again, &[]).success();
    let run = tiny.run("again");
    let second = checkpoint(&run, 2);
    let ended = train(&again, &["--resume", second.to_str().unwrap()]);
    assert!(ended.stderr.contains("going on from step 2"), "{}", ended.stderr);
    ended.success();
    assert_same_end(&run, &tiny.run("whole"), STEPS);

    let other = tiny.stage1("other", &[("/optimizer/lr", json!(5e-4))]);
    let message = refused(train(&other, &["--resume", second.to_str().unwrap()]));
    assert!(message.contains("expected a checkpoint of this configuration"), "{message}");
    let message = refused(train(&other, &["--resume", "/absent"]));
    assert!(message.contains("/absent"), "{message}");
    flip_a_byte(&second.join("model.safetensors"));
    let message = refused(train(&again, &["--resume", second.to_str().unwrap()]));
    assert!(message.contains("model.safetensors: expected blake3"), "{message}");
    // What was refused left nothing behind.
    train(&other, &["--resume", "never"]).success();
}
