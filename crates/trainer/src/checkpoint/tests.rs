use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::config::BestMetric;

fn store(base: &TempDir, keep: usize, best: Option<BestMetric>) -> CheckpointStore {
    CheckpointStore::open(&base.path().join("checkpoints"), keep, best).unwrap()
}

fn write(store: &CheckpointStore, step: u64, recall: Option<f64>) {
    let metric = recall.map(|value| Metric { name: "retrieval_r1".into(), value });
    store.write(step, metric, |folder| fill(folder, step)).unwrap();
}

fn fill(folder: &mut CheckpointFolder, step: u64) -> Result<(), CheckpointError> {
    folder.file("model.safetensors", |out| out.write_all(&vec![step as u8; 100_000]))?;
    folder.file("state.json", |out| write!(out, "{step}"))
}

/// A writer into a disk that is full after some bytes.
fn full_disk(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&[1; 50_000])?;
    Err(io::Error::from(io::ErrorKind::StorageFull))
}

#[test]
fn a_written_checkpoint_is_the_newest_and_whole() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 3, None);
    assert!(store.newest().unwrap().checkpoint.is_none());
    write(&store, 1000, None);
    write(&store, 2000, Some(0.5));
    let newest = store.newest().unwrap();
    let checkpoint = newest.checkpoint.unwrap();
    assert!(newest.rejected.is_empty());
    assert_eq!((checkpoint.step(), checkpoint.metric().unwrap().value), (2000, 0.5));
    assert_eq!(checkpoint.path(), base.path().join("checkpoints/step_00002000"));
    assert_eq!(fs::read_to_string(checkpoint.file("state.json")).unwrap(), "2000");
}

#[test]
fn a_damaged_newest_is_reported_and_the_one_before_taken() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("blake3", |folder| {
            let path = folder.join("model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            bytes[77_777] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("100000 bytes", |folder| fs::write(folder.join("model.safetensors"), [0; 99_999]).unwrap()),
        ("no file", |folder| fs::remove_file(folder.join("state.json")).unwrap()),
        ("got none", |folder| fs::remove_file(folder.join("MANIFEST.json")).unwrap()),
        ("manifest", |folder| {
            let path = folder.join("MANIFEST.json");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(path, &text[..text.len() / 2]).unwrap();
        }),
        ("../state.json", |folder| {
            let path = folder.join("MANIFEST.json");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(path, text.replace("state.json", "../state.json")).unwrap();
        }),
    ];
    for (expected, damage) in damages {
        let base = tempfile::tempdir().unwrap();
        let store = store(&base, 3, None);
        write(&store, 1, None);
        write(&store, 2, None);
        damage(&store.path(2));
        let newest = store.newest().unwrap();
        assert_eq!(newest.checkpoint.unwrap().step(), 1);
        assert_eq!(newest.rejected[0].path, store.path(2));
        let reason = newest.rejected[0].reason.to_string();
        assert!(reason.contains(expected) && !reason.contains('\n'), "{reason}");
    }
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_and_one_clear_line() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 1, None);
    write(&store, 1, None);
    let error = store.write(2, None, |folder| folder.file("model.safetensors", full_disk)).unwrap_err();
    let line = error.to_string();
    assert!(matches!(error, CheckpointError::Write { .. }) && line.contains("model.safetensors"), "{line}");
    assert!(line.ends_with("; free some space, the checkpoints before it are untouched"), "{line}");
    assert_eq!(store.newest().unwrap().checkpoint.unwrap().step(), 1);
    assert_eq!(
        fs::read_dir(base.path().join("checkpoints")).unwrap().count(),
        1,
        "the torn folder gives its space back"
    );
    write(&store, 2, None);
    assert_eq!(store.steps().unwrap(), [2]);
}

/// The device that is always full, whose error comes wrapped, as from a writer of tensors.
#[test]
#[cfg(target_os = "linux")]
fn what_the_system_says_of_a_full_disk_is_recognised() {
    #[derive(Debug, thiserror::Error)]
    #[error("tensor a.weight: {source}")]
    struct Wrapped {
        source: io::Error,
    }
    let base = tempfile::tempdir().unwrap();
    let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = store(&base, 1, None).write(1, None, |folder| {
        folder.file("model.safetensors", |_| full.write_all(&[0; 10]).map_err(|source| Wrapped { source }))
    });
    let line = error.unwrap_err().to_string();
    assert!(line.contains("No space left on device") && line.contains("free some space"), "{line}");
}

#[test]
fn retention_keeps_the_newest_and_the_best() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 2, Some(BestMetric::RetrievalR1));
    for (step, recall) in [(1, Some(0.2)), (2, Some(0.6)), (3, None), (4, Some(0.6)), (5, Some(0.1)), (6, Some(0.3))] {
        write(&store, step, recall);
    }
    assert_eq!(store.steps().unwrap(), [2, 5, 6]);
    write(&store, 7, Some(0.7));
    write(&store, 8, None);
    write(&store, 9, None);
    assert_eq!(store.steps().unwrap(), [7, 8, 9]);
}

#[test]
fn the_least_loss_is_the_best_and_other_metrics_do_not_count() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 1, Some(BestMetric::ValLoss));
    write(&store, 1, Some(0.0));
    for (step, value) in [(2, 3.0), (3, 1.0), (4, 2.0)] {
        store.write(step, Some(Metric { name: "val_loss".into(), value }), |folder| fill(folder, step)).unwrap();
    }
    assert_eq!(store.steps().unwrap(), [3, 4]);
}

#[test]
fn what_a_crash_left_behind_is_cleaned_up() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("checkpoints");
    write(&store(&base, 3, None), 1, None);
    for name in [".writing-step_00000002", ".removing-step_00000000", ".replaced-step_00000001"] {
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("model.safetensors"), "torn").unwrap();
    }
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    let store = store(&base, 3, None);
    assert_eq!(store.steps().unwrap(), [1]);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);

    // Between the two renames of a replacement the old one has only its hidden name.
    fs::rename(store.path(1), folder.join(".replaced-step_00000001")).unwrap();
    let store = self::store(&base, 3, None);
    assert_eq!(store.newest().unwrap().checkpoint.unwrap().step(), 1);
}

#[test]
fn the_same_step_is_replaced_and_later_ones_can_be_set_aside() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 1, None);
    write(&store, 1, Some(0.1));
    write(&store, 1, Some(0.2));
    assert_eq!(store.newest().unwrap().checkpoint.unwrap().metric().unwrap().value, 0.2);
    write(&store, 9, None);
    fs::remove_file(store.path(9).join("state.json")).unwrap();
    let aside = store.set_aside_after(1).unwrap();
    assert_eq!(aside, [base.path().join("checkpoints/step_00000009.superseded")]);
    write(&store, 2, None);
    assert_eq!(store.steps().unwrap(), [2], "a later damaged one would have counted as the newest");
}

#[test]
fn the_writer_reports_failures_at_the_next_call() {
    let base = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::new(store(&base, 3, None));
    assert_eq!(writer.submit(1, None, Box::new(|folder| fill(folder, 1))).unwrap(), None);
    let written = writer.submit(2, None, Box::new(|folder| folder.file("model.safetensors", full_disk))).unwrap();
    assert_eq!(written, Some(writer.store().path(1)));
    let failed = writer.submit(3, None, Box::new(|folder| fill(folder, 3))).unwrap_err();
    assert!(failed.to_string().contains("step_00000002"), "{failed}");
    assert_eq!(writer.wait().unwrap(), Some(writer.store().path(3)));
    writer.submit(4, None, Box::new(|_| panic!("a bug in a snapshot"))).unwrap();
    assert!(matches!(writer.finish(), Err(CheckpointError::WriterLost { step: 4 })));
}

#[test]
fn submitting_does_not_wait_for_the_disk() {
    let base = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::new(store(&base, 3, None));
    let (release, wait) = mpsc::channel::<()>();
    let snapshot: Snapshot = Box::new(move |folder| {
        wait.recv().unwrap();
        fill(folder, 1)
    });
    writer.submit(1, None, snapshot).unwrap();
    assert!(writer.poll().is_none());
    assert!(writer.store().steps().unwrap().is_empty());
    release.send(()).unwrap();
    assert_eq!(writer.finish().unwrap(), Some(base.path().join("checkpoints/step_00000001")));
}

#[test]
fn a_state_of_another_format_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 3, None);
    let other = r#"{"format": 2, "step": 1, "new_key": 0}"#;
    let path = store.write(1, None, |folder| folder.file("state.json", |out| out.write_all(other.as_bytes()))).unwrap();
    let error = TrainState::read(&Checkpoint::open(&path).unwrap()).unwrap_err().to_string();
    assert!(error.ends_with("state.json: expected format 1, got 2"), "{error}");
}

#[test]
fn a_state_that_holds_generators_too_is_read_as_one_without() {
    let base = tempfile::tempdir().unwrap();
    let store = store(&base, 3, None);
    let state = TrainState::new("config".into(), "data".into());
    let mut older = serde_json::to_value(&state).unwrap();
    older["rng"] = serde_json::json!({"cpu": "00ff"});
    let path = store.write(1, None, |folder| folder.file("state.json", |out| write!(out, "{older}"))).unwrap();
    assert_eq!(TrainState::read(&Checkpoint::open(&path).unwrap()).unwrap(), state);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_state_reads_back_as_written(step: u64, stream_position: u64, bad: Vec<(u64, u64)>, value in -1e9f64..1e9) {
        let base = tempfile::tempdir().unwrap();
        let store = store(&base, 1, None);
        let mut state = TrainState::new("config".into(), "data".into());
        state.step = step;
        state.stream_position = stream_position;
        bad.iter().for_each(|&(index, position)| state.bad_samples.insert(index, position));
        state.best = Some(Best { metric: Metric { name: "val_loss".into(), value: value.round() }, step });
        let path = store.write(step % 1000, None, |folder| state.write(folder)).unwrap();
        prop_assert_eq!(TrainState::read(&Checkpoint::open(&path).unwrap()).unwrap(), state);
    }
}
