//! Directories of weights: one file, an index with shards, pre-training heads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blip2_torchx::params::TensorSource;
use blip2_weights::{WeightsDir, WeightsError, save_safetensors};
use tempfile::TempDir;

use crate::fixtures::{identical, line, names, numbered, tensors};

const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn save(directory: &Path, file: &str, shapes: &[(&str, &[i64])]) {
    save_safetensors(&tensors(shapes), &BTreeMap::new(), &directory.join(file)).unwrap();
}

fn sharded(weight_map: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), ONE, &[("a", &[2]), ("b", &[3])]);
    save(directory.path(), TWO, &[("c", &[4, 1])]);
    let index = format!(r#"{{"metadata": {{"total_size": 36}}, "weight_map": {weight_map}}}"#);
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    directory
}

fn whole() -> TempDir {
    sharded(&format!(r#"{{"a": "{ONE}", "b": "{ONE}", "c": "{TWO}"}}"#))
}

#[test]
fn shards_and_heads_are_one_source() {
    let directory = whole();
    save(directory.path(), "pretraining_heads.safetensors", &[("temp", &[])]);
    let weights = WeightsDir::open(directory.path()).unwrap();
    assert_eq!(names(&weights), ["a", "b", "c", "temp"]);
    assert!(identical(&weights.read("c").unwrap(), &numbered("c", &[4, 1])));
    assert!(identical(&weights.read("temp").unwrap(), &numbered("temp", &[])));
    assert!(weights.read("d").is_err());
}

#[test]
fn a_tensor_in_two_files() {
    let directory = whole();
    save(directory.path(), "pretraining_heads.safetensors", &[("a", &[2])]);
    let message = line(WeightsDir::open(directory.path()));
    assert!(message.ends_with(&format!("a appears twice, as {ONE} and as pretraining_heads.safetensors")), "{message}");
}

#[test]
fn a_shard_that_is_missing() {
    let directory = whole();
    fs::remove_file(directory.path().join(TWO)).unwrap();
    assert!(line(WeightsDir::open(directory.path())).contains(&format!("shard {TWO} is missing")));
}

#[test]
fn an_index_that_promises_more_than_the_shards_hold() {
    let directory = sharded(&format!(r#"{{"a": "{ONE}", "b": "{ONE}", "c": "{TWO}", "d": "{TWO}"}}"#));
    assert!(matches!(
        WeightsDir::open(directory.path()),
        Err(WeightsError::ShardLacks { name, .. }) if name == "d"
    ));
}

#[test]
fn a_shard_that_holds_more_than_the_index_knows() {
    let directory = sharded(&format!(r#"{{"a": "{ONE}", "c": "{TWO}"}}"#));
    assert!(matches!(
        WeightsDir::open(directory.path()),
        Err(WeightsError::IndexLacks { name, .. }) if name == "b"
    ));
}

#[test]
fn an_index_that_points_outside_its_directory() {
    for shard in ["../secret.safetensors", "/etc/passwd", "..", "sub/shard.safetensors", ""] {
        let directory = sharded(&format!(r#"{{"a": "{shard}"}}"#));
        assert!(matches!(WeightsDir::open(directory.path()), Err(WeightsError::ShardName { .. })), "{shard}");
    }
}

#[test]
fn an_index_that_is_not_one() {
    for (index, expected) in [
        ("{", "invalid JSON"),
        ("[]", "expected an object"),
        ("{}", "weight_map: expected an object, got nothing"),
        (r#"{"weight_map": {"a": 3}}"#, "weight_map.a: expected a file name, got 3"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ] {
        let directory = whole();
        fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
        let message = line(WeightsDir::open(directory.path()));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn no_weights_and_weights_of_another_format() {
    let directory = tempfile::tempdir().unwrap();
    assert!(line(WeightsDir::open(directory.path())).ends_with("no pytorch_model.bin and no index of either"));
    fs::write(directory.path().join("tf_model.h5"), "x").unwrap();
    assert!(line(WeightsDir::open(directory.path())).contains("tf_model.h5 must first be saved as safetensors"));
}
