//! Weights that do not fit: one clear line, and nothing left behind that stands in the way of the corrected run.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::tiny_run::{TinyRun, refused, train};
use crate::{blip2, copied};

/// Changes the header of a safetensors file; the tensors' bytes stay where they are.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
    edit(&mut header);
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize(text.len().next_multiple_of(8), b' ');
    fs::write(path, [&(text.len() as u64).to_le_bytes()[..], &text, &bytes[end..]].concat()).unwrap();
}

const QUERY: &str = "qformer.encoder.layer.0.attention.attention.query.weight";

#[test]
fn weights_that_do_not_fit_and_then_do() {
    let tiny = TinyRun::new();
    let whole = fs::read(tiny.init().join("model.safetensors")).unwrap();
    let config = tiny.stage1("a", &[("/schedule/steps", json!(1)), ("/optimizer/lr", json!(5e-4))]);
    let weights = tiny.init().join("model.safetensors");
    type Damage = fn(&Path);
    let damages: [(Damage, &[&str]); 4] = [
        (
            |path| {
                edit_header(path, |header| {
                    let tensor = header.remove(QUERY).unwrap();
                    header.insert("qformer.stray".into(), tensor);
                })
            },
            &["missing", QUERY, "unexpected", "qformer.stray"],
        ),
        (
            |path| {
                edit_header(path, |header| {
                    let size: u64 =
                        header[QUERY]["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
                    header[QUERY]["shape"] = json!([size, 1]);
                })
            },
            &[QUERY, "expected"],
        ),
        (
            |path| fs::write(path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap(),
            &["Git LFS pointer", "git lfs pull"],
        ),
        (|path| fs::write(path, [0xFF; 64]).unwrap(), &["model.safetensors", "header"]),
    ];
    for (damage, parts) in damages {
        fs::write(&weights, &whole).unwrap();
        damage(&weights);
        let message = refused(train(&config, &[]));
        for part in parts {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
    fs::remove_file(&weights).unwrap();
    let message = refused(train(&config, &[]));
    assert!(message.contains("model.safetensors"), "{message}");

    let description = tiny.init().join("config.json");
    let kept = fs::read(&description).unwrap();
    fs::remove_file(&description).unwrap();
    let message = refused(train(&config, &[]));
    assert!(message.contains("model.qformer.init: expected a folder with config.json"), "{message}");
    fs::write(&description, kept).unwrap();

    // Other weights and another learning rate: the folder is still free for them.
    fs::write(&weights, &whole).unwrap();
    train(&tiny.stage1("a", &[("/schedule/steps", json!(1))]), &["--resume", "never"]).success();
}

#[test]
fn stage_2_with_another_width_than_its_stage_1() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    let wide = copied("stage1");
    let path = wide.path().join("config.json");
    let mut description: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let width = description["vision_config"]["hidden_size"].as_i64().unwrap();
    description["vision_config"]["hidden_size"] = json!(2 * width);
    fs::write(&path, description.to_string()).unwrap();
    let config = tiny.stage2("a", "stage1", &[("/model/vision/weights", json!(wide.path()))]);
    let message = refused(train(&config, &[]));
    let expected = format!("width of the image features: {} here, but model.qformer.init", 2 * width);
    assert!(message.contains(&expected) && message.ends_with(&format!("has {width}")), "{message}");

    let config = tiny.stage2("a", "stage1", &[("/model/qformer/query_tokens", json!(4))]);
    let message = refused(train(&config, &[]));
    assert!(message.contains("model.qformer.query_tokens: 4 here") && message.ends_with("has 8"), "{message}");
    train(&tiny.stage2("a", "stage1", &[("/schedule/steps", json!(1))]), &[]).success();
}

#[test]
fn stage_1_begins_from_a_directory_as_transformers_saves_it() {
    let tiny = TinyRun::new();
    let one_step = ("/schedule/steps", json!(1));
    train(&tiny.stage1("a", std::slice::from_ref(&one_step)), &[]).success();
    let model = tiny.path("model");
    blip2(["export".into(), "--checkpoint".into(), tiny.run("a"), "--out".into(), model.clone()]).success();
    let heads = model.join("pretraining_heads.safetensors");
    fs::remove_file(&heads).unwrap();

    let config = tiny.stage1("b", &[one_step, ("/model/qformer/init", json!(model))]);
    let ended = train(&config, &[]);
    assert!(ended.stderr.contains("has no temperature and no ITG head"), "{}", ended.stderr);
    ended.success();
    let run: Value = serde_json::from_slice(&fs::read(tiny.run("b").join("run.json")).unwrap()).unwrap();
    assert!(run.to_string().contains("\"fresh\":6"), "{run}");
    let found: Value =
        serde_json::from_str(&blip2(["inspect".into(), model.clone(), "--json".into()]).success()).unwrap();
    assert_eq!([&found["parts"][1]["fresh"], &found["parts"][1]["missing"]], [6, 0]);

    // One of the six is a file that has lost the others.
    let header = r#"{"temp":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}    "#;
    let temp = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &0.07f32.to_le_bytes()].concat();
    fs::write(&heads, temp).unwrap();
    let message = refused(train(&config, &["--resume", "never", "--set", "run.name=c"]));
    assert!(message.contains("missing") && message.contains("cls.predictions.bias"), "{message}");
}
