//! From a folder of pictures to shards, and back to what is in them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{blip2, golden};

/// Three pictures with captions, and a fourth row whose picture is missing.
fn packed(folder: &Path) -> String {
    let rows = (0..4).map(|i| format!("{{\"image\": \"image_{i}.png\", \"caption\": \"picture number {i}\"}}\n"));
    fs::write(folder.join("captions.jsonl"), rows.collect::<String>()).unwrap();
    for i in 0..3 {
        let name = format!("image_{i}.png");
        fs::copy(golden("stage2_llama").join(&name), folder.join(&name)).unwrap();
    }
    let (captions, out) = (folder.join("captions.jsonl"), folder.join("shards"));
    let arguments = ["--captions".into(), captions, "--out".into(), out, "--shard-samples".into(), "2".into()];
    let ended = blip2(["shards".into(), "pack".into()].into_iter().chain::<[PathBuf; 6]>(arguments));
    assert!(
        ended.stderr.contains("warning: left out: ") && ended.stderr.contains("captions.jsonl:4: "),
        "{}",
        ended.stderr
    );
    ended.success()
}

fn shards(command: &str, folder: &Path, more: &[&str]) -> crate::Ended {
    let pattern = folder.join("shards/*.tar");
    blip2(["shards", command, pattern.to_str().unwrap()].iter().chain(more))
}

#[test]
fn pack_index_verify_stats() {
    let folder = tempfile::tempdir().unwrap();
    let printed = packed(folder.path());
    assert_eq!(printed.lines().last(), Some("3 samples in 2 shards, 1 rows left out"));
    let printed = shards("index", folder.path(), &[]).success();
    assert_eq!(printed.lines().last(), Some("3 samples in 2 shards, 0 problems"));
    assert_eq!(shards("verify", folder.path(), &[]).success(), "3 good samples in 2 shards, 0 problems\n");
    let stats: Value = serde_json::from_str(&shards("stats", folder.path(), &["--json"]).success()).unwrap();
    assert_eq!(stats["samples"], 3);
    assert_eq!(stats["formats"]["PNG"], 3);
    assert_eq!(stats["width"]["median"], 32);
    assert_eq!(stats["caption_words"]["mean"], 3.0);
    assert!(shards("stats", folder.path(), &[]).success().contains("3 samples in 2 shards"));
}

#[test]
fn a_truncated_shard_is_found_and_told() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let path = folder.path().join("shards/00000.tar");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let ended = shards("verify", folder.path(), &[]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stdout.contains("00000.tar"), "{}", ended.stdout);
    assert!(ended.stderr.contains("problems found"), "{}", ended.stderr);
}

#[test]
fn patterns_that_match_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["index", "verify", "stats"] {
        let message = shards(command, folder.path(), &[]).failure();
        assert!(message.contains("*.tar"), "{message}");
    }
}

#[test]
fn bench_loader_tells_images_a_second_and_where_the_time_goes() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let pattern = folder.path().join("shards/*.tar");
    let bench = |more: &[&str]| {
        let fixed = ["bench", "loader", pattern.to_str().unwrap(), "--threads", "1", "--batch", "2", "--size", "16"];
        blip2(fixed.iter().chain(more))
    };
    let report: Value = serde_json::from_str(&bench(&["--json"]).success()).unwrap();
    assert_eq!((&report["images"], &report["threads"], &report["tokenised"]), (&4.into(), &1.into(), &false.into()));
    let seconds = |value: &Value| value.as_f64().unwrap();
    assert!(seconds(&report["images_per_s"]) > 0.0 && seconds(&report["mb_per_s"]) > 0.0, "{report}");
    let timings = &report["timings"];
    let spent: f64 = ["read_s", "text_s", "decode_s", "resize_s"].iter().map(|phase| seconds(&timings[*phase])).sum();
    assert!(spent > 0.0 && seconds(&report["wait_s"]) <= seconds(&report["seconds"]), "{report}");

    let tokenizer = golden("stage2_llama");
    let printed = bench(&["--augment", "none", "--tokenizer", tokenizer.to_str().unwrap()]).success();
    assert!(printed.starts_with("4 images in ") && printed.contains(" images/s, "), "{printed}");
    for phase in ["read ", "decode ", "resize ", "text ", "idle ", "wait for a batch "] {
        assert!(printed.lines().any(|line| line.starts_with(phase) && line.contains(" %")), "{printed}");
    }
    let ended = bench(&["--tokenizer", folder.path().to_str().unwrap()]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.starts_with("error: tokenizer ") && ended.stdout.is_empty(), "{}", ended.stderr);
}
