//! Both stages through the programs: shards, training, evaluation, export, captions.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{blip2, copied, golden, run_program};

/// A word-level tokenizer with BERT's frame around every text.
fn tokenizer() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let words = special.iter().map(|token| token.to_string()).chain((4..299).map(|i| format!("t{i}")));
    let vocabulary: serde_json::Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    let part = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let template = json!([part("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, part("[SEP]")]);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
        }},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
}

fn write_shards(folder: &Path) {
    let rows = (0..6).map(|i| format!("image_{i}.png\tt{} t{} t{}\n", 10 + i, 20 + i, 30 + i));
    fs::write(folder.join("captions.tsv"), rows.collect::<String>()).unwrap();
    let images = golden("stage2_llama");
    let arguments = [
        "--captions".into(),
        folder.join("captions.tsv"),
        "--images".into(),
        images,
        "--out".into(),
        folder.join("shards"),
    ];
    blip2(["shards".into(), "pack".into()].into_iter().chain::<[PathBuf; 6]>(arguments)).success();
}

fn write_config(folder: &Path, stage: u8, init: &Path) -> PathBuf {
    let shards = folder.join("shards/*.tar");
    let mut config = json!({
        "run": {"dir": folder.join("runs"), "device": "cpu", "precision": "fp32"},
        "task": {"stage": stage, "max_text_tokens": 12},
        "model": {"vision": {"weights": golden("stage1"), "dtype": "fp32"}, "qformer": {"init": init, "query_tokens": 8}},
        "data": {"train": [{"shards": shards}], "val": {"shards": shards}, "image": {"size": 32, "augment": "none"}},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "schedule": {"steps": 4, "global_batch": 4},
        "checkpoint": {"every": 2}, "log": {"every": 1}, "eval": {"every": 4, "captions": 2},
    });
    if stage == 2 {
        config["model"]["language"] = json!({"weights": golden("stage2_llama"), "dtype": "fp32"});
        config["eval"]["retrieval"] = json!(false);
    }
    let path = folder.join(format!("stage{stage}.yaml"));
    fs::write(&path, config.to_string()).unwrap(); // JSON is YAML
    path
}

#[test]
fn from_pictures_to_captions() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_shards(folder);
    let init = copied("stage1");
    fs::write(init.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let configs = [write_config(folder, 1, init.path()), write_config(folder, 2, &folder.join("runs/stage1"))];
    let both = ["--config".into(), configs[0].clone(), "--config".into(), configs[1].clone()];
    let train = |more: &[&str]| {
        run_program(env!("CARGO_BIN_EXE_train"), both.iter().cloned().chain(more.iter().map(PathBuf::from)))
    };

    train(&["--dry-run"]).success();
    assert!(!folder.join("runs").exists(), "a dry run writes nothing");
    train(&[]).success();
    for stage in ["stage1", "stage2"] {
        let metrics = fs::read_to_string(folder.join("runs").join(stage).join("metrics.jsonl")).unwrap();
        let steps = metrics.lines().filter(|line| serde_json::from_str::<Value>(line).unwrap().get("loss").is_some());
        assert_eq!(steps.count(), 4, "{metrics}");
    }
    let again = train(&[]);
    assert!(again.stderr.contains("finished already"), "{}", again.stderr);
    assert_eq!(again.success(), "");
    assert!(train(&["--resume", "never"]).failure().contains("holds a run already"));

    let evaluate = |config: &Path, task: &str| {
        let arguments =
            ["evaluate".into(), "--config".into(), config.to_path_buf(), "--task".into(), task.into(), "--json".into()];
        blip2::<PathBuf>(arguments)
    };
    // The run's own copy of its configuration serves as well.
    for config in [configs[0].clone(), folder.join("runs/stage1/config.yaml")] {
        let recall: Value = serde_json::from_str(&evaluate(&config, "retrieval").success()).unwrap();
        assert_eq!(recall["images"], 6);
        let ranks: Vec<&Value> = recall["recall"].as_array().unwrap().iter().map(|r| &r["k"]).collect();
        assert_eq!(ranks, [1, 5, 10]);
        assert_eq!(
            (&recall["recall"][2]["image_to_text"], &recall["recall"][2]["text_to_image"]),
            (&json!(1.0), &json!(1.0))
        );
    }
    let captions: Value = serde_json::from_str(&evaluate(&configs[1], "caption").success()).unwrap();
    assert_eq!(captions["captions"].as_array().unwrap().len(), 6);
    assert_eq!(captions["captions"][5]["truth"], "t15 t25 t35");
    assert!(evaluate(&configs[1], "retrieval").failure().contains("task.stage: expected 1"));

    let out = folder.join("export");
    let run = folder.join("runs/stage2");
    let printed =
        blip2::<PathBuf>(["export".into(), "--checkpoint".into(), run, "--out".into(), out.clone()]).success();
    assert!(printed.contains("the model of step 4"), "{printed}");
    let mut arguments =
        ["generate".into(), "--model".into(), out, "--json".into(), "--device".into(), "cpu".into()].to_vec();
    arguments.extend(["--min-new-tokens", "1", "--image"].map(PathBuf::from));
    arguments.extend((0..6).map(|i| golden("stage2_llama").join(format!("image_{i}.png"))));
    let printed = blip2(arguments).success();
    // What the run said of its held-out pictures when it was evaluated.
    let said: Vec<Value> =
        printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone()).collect();
    let expected: Vec<Value> =
        captions["captions"].as_array().unwrap().iter().map(|pair| pair["caption"].clone()).collect();
    assert_eq!(said, expected);
}
