//! Steps that are not finite: recorded, skipped, and after ten in a row the end.

use std::fs;

use crate::setup::{init, write_config, write_shards};
use crate::{blip2, run_program};

#[test]
fn a_diverging_run_records_its_bad_steps_and_stops_after_ten() {
    let (folder, init) = (tempfile::tempdir().unwrap(), init());
    write_shards(folder.path());
    let config = write_config(folder.path(), 1, init.path());
    let mut arguments = vec!["--config".to_string(), config.display().to_string()];
    for set in ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "schedule.steps=20", "checkpoint.every=20"] {
        arguments.extend(["--set".to_string(), set.to_string()]);
    }
    let ended = run_program(env!("CARGO_BIN_EXE_train"), arguments);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let message = ended.stderr.lines().last().unwrap();
    assert!(message.starts_with("error: 10 steps in a row were not finite"), "{message}");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);

    let records = folder.path().join("runs/stage1/bad_steps");
    let mut steps: Vec<_> = fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path()).collect();
    steps.sort();
    assert_eq!(steps.len(), 10);
    let out = folder.path().join("replayed.safetensors");
    let replayed = blip2([
        "replay".into(),
        "--model".into(),
        steps[0].join("model"),
        "--task".into(),
        "stage1".into(),
        "--batch".into(),
        steps[0].join("batch.safetensors"),
        "--out".into(),
        out.clone(),
        "--device".into(),
        "cpu".into(),
    ]);
    let printed = replayed.success();
    assert!(printed.contains("loss_itc"), "{printed}");
    assert!(out.exists());
}
