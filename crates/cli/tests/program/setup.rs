//! A tiny world to train in: shards from the golden case's pictures, a tokenizer, configurations of both stages.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{blip2, copied, golden};

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

pub fn write_shards(folder: &Path) {
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

pub fn write_config(folder: &Path, stage: u8, init: &Path) -> PathBuf {
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

/// A stage-1 model directory with a tokenizer, to start from.
pub fn init() -> tempfile::TempDir {
    let init = copied("stage1");
    fs::write(init.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    init
}
