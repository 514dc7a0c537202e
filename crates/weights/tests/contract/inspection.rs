//! What `inspect` tells of each kind of path.

use std::collections::BTreeMap;
use std::fs;

use blip2_weights::{Contents, inspect, save_safetensors};
use serde_json::json;
use tch::Kind;

use crate::fixtures::{golden, line, numbered, tensors, write_model};

#[test]
fn a_whole_model() {
    let found = inspect(&golden("stage1")).unwrap();
    assert_eq!(found.contents, Contents::Blip2Directory);
    let part = |part: &str| found.groups.iter().find(|group| group.part == part).unwrap();
    assert_eq!((part("cls").tensors, part("cls").parameters, part("cls").dtype.as_str()), (5, 300 + 48 * 51, "F32"));
    assert_eq!(part("query_tokens").bytes, 8 * 48 * 4);
    assert_eq!(found.metadata["qformer_decoder_start_token_id"], "299");
    let text = found.to_string();
    let mut rows = text.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    assert!(rows.any(|row| row == ["model.safetensors", "temp", "F32", "1", "1", "0.0"]), "{text}");
    assert!(text.lines().last().unwrap().starts_with("total"));
}

#[test]
fn a_checkpoint_with_its_optimizer_and_state() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let save = |file: &str, shapes| save_safetensors(&tensors(shapes), &BTreeMap::new(), &path.join(file)).unwrap();
    save("model.safetensors", &[("qformer.a", &[2, 3])]);
    save("optimizer.safetensors", &[("exp_avg/qformer.a", &[2, 3]), ("exp_avg_sq/qformer.a", &[2, 3])]);
    fs::write(path.join("state.json"), json!({"step": 1000, "best": null}).to_string()).unwrap();
    fs::write(path.join("config.json"), json!({"model_type": "blip-2"}).to_string()).unwrap();
    let found = inspect(path).unwrap();
    assert_eq!(found.contents, Contents::Checkpoint);
    assert_eq!(found.metadata, BTreeMap::from([("step".to_string(), "1000".to_string())]));
    let rows: Vec<(&str, &str)> = found.groups.iter().map(|g| (g.file.as_str(), g.part.as_str())).collect();
    let optimizer = "optimizer.safetensors";
    assert_eq!(rows, [("model.safetensors", "qformer"), (optimizer, "exp_avg"), (optimizer, "exp_avg_sq")]);
    assert_eq!(found.totals(), (3, 18, 72));
    assert_eq!(serde_json::to_value(&found).unwrap()["contents"], "checkpoint");
}

#[test]
fn a_file_with_two_dtypes_and_metadata() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    let entries = vec![
        ("a.weight".to_string(), numbered("a", &[2])),
        ("a.bias".to_string(), numbered("a", &[3]).to_kind(Kind::BFloat16)),
    ];
    save_safetensors(&entries, &BTreeMap::from([("format".into(), "pt".into())]), &path).unwrap();
    let found = inspect(&path).unwrap();
    assert_eq!(found.contents, Contents::SafetensorsFile);
    let rows: Vec<(&str, u64)> = found.groups.iter().map(|g| (g.dtype.as_str(), g.bytes)).collect();
    assert_eq!(rows, [("BF16", 6), ("F32", 8)]);
    assert_eq!(found.metadata["x.safetensors: format"], "pt");
}

#[test]
fn a_tower_and_nothing_at_all() {
    let directory = tempfile::tempdir().unwrap();
    assert!(line(inspect(directory.path())).contains("no model.safetensors"));
    assert!(line(inspect(&directory.path().join("absent"))).ends_with("no such file or directory"));
    write_model(directory.path(), &json!({"model_type": "dinov2"}), &[("embeddings.cls_token", &[1])]);
    assert_eq!(inspect(directory.path()).unwrap().contents, Contents::TowerDirectory);
}
