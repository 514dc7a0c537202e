//! Directories of weights: one file, an index with shards, pre-training heads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blip2_torchx::params::{LoadPlan, LoadProblem, TensorSource};
use blip2_weights::plans::language_model;
use blip2_weights::{ModelDir, Part, WeightsDir, WeightsError, save_safetensors};
use tempfile::TempDir;

use crate::fixtures::{identical, line, names, numbered, store, tensors};

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
    let weights = WeightsDir::open(directory.path()).unwrap();
    assert_eq!(names(&weights), ["a", "b", "c"]);
    // Whoever needs what is not there is told, and nobody else.
    let audit = |shapes: &[(&str, &[i64])]| store(shapes).audit(&weights, &LoadPlan::exact()).problems;
    let held: [(&str, &[i64]); 4] = [("a", &[2]), ("b", &[3]), ("c", &[4, 1]), ("d", &[1])];
    assert!(audit(&held[..3]).is_empty());
    assert!(matches!(&audit(&held)[..], [LoadProblem::Missing { name, .. }] if name == "d"), "{:?}", audit(&held));
}

#[test]
fn a_t5_whose_index_lists_the_aliases_that_its_shards_have_lost() {
    let directory = tempfile::tempdir().unwrap();
    let (shared, norm) = ("shared.weight", "encoder.final_layer_norm.weight");
    save(directory.path(), ONE, &[(shared, &[5, 2])]);
    save(directory.path(), TWO, &[(norm, &[2])]);
    let aliases = format!(r#""encoder.embed_tokens.weight": "{ONE}", "decoder.embed_tokens.weight": "{TWO}""#);
    let index = format!(r#"{{"weight_map": {{"{shared}": "{ONE}", "{norm}": "{TWO}", {aliases}}}}}"#);
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(directory.path().join("config.json"), r#"{"model_type": "t5"}"#).unwrap();
    let model = ModelDir::open(directory.path()).unwrap();
    let part = model.part(Part::Language).unwrap();
    let params = store(&[(&format!("language_model.{shared}"), &[5, 2]), (&format!("language_model.{norm}"), &[2])]);
    assert_eq!(params.load(&part.weights, &language_model(true)).unwrap().loaded.len(), 2);
    let loaded = params.get(&format!("language_model.{shared}")).unwrap();
    assert!(identical(&loaded, &numbered(shared, &[5, 2])));
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
        (r#"{"weight_map": {}}"#, "weight_map: expected shards, got none"),
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
