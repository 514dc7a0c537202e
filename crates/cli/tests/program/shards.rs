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
