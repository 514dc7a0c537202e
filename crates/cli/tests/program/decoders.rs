//! Stage 2 with language models other than Llama, through the programs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tiny_run::{TinyRun, refused, train};
use crate::{blip2, copied, golden};

/// The golden OPT with a tokenizer whose sixth token is the line break.
pub fn opt() -> tempfile::TempDir {
    let folder = copied("stage2_opt");
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let words = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    words.remove("t5");
    words.insert("\n".into(), json!(5));
    tokenizer["pre_tokenizer"] =
        json!({"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": false});
    fs::write(path, tokenizer.to_string()).unwrap();
    folder
}

fn stage2(tiny: &TinyRun, language: &Path, more: &[(&str, Value)]) -> PathBuf {
    let mut changes = vec![
        ("/model/language", json!({"weights": language, "dtype": "fp32"})),
        ("/model/qformer/init", json!(golden("stage2_opt"))),
    ];
    changes.extend_from_slice(more);
    tiny.stage2("opt", "none", &changes)
}

#[test]
fn opt_learns_captions_that_end_with_a_line_break() {
    let (tiny, language) = (TinyRun::new(), opt());
    train(&stage2(&tiny, language.path(), &[]), &[]).success();
    let metrics = fs::read_to_string(tiny.run("opt").join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().any(|line| line.contains("\"loss_lm\"")), "{metrics}");

    let out = tiny.path("export");
    let run = tiny.run("opt");
    blip2::<PathBuf>(["export".into(), "--checkpoint".into(), run, "--out".into(), out.clone()]).success();
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap() };
    let config = json("config.json");
    assert_eq!((&config["before_queries"], &config["text_config"]["eos_token_id"]), (&json!([]), &json!(5)));
    assert_eq!(json("generation_config.json")["eos_token_id"], 5);

    let image = golden("stage2_opt").join("image_0.png");
    let arguments = ["generate".into(), "--model".into(), out, "--device".into(), "cpu".into(), "--json".into()];
    let printed = blip2::<PathBuf>(arguments.into_iter().chain(["--image".into(), image])).success();
    let line: Value = serde_json::from_str(&printed).unwrap();
    assert!(line["ids"].as_array().unwrap().iter().all(|id| id != 5), "cut before the line break: {line}");
}

#[test]
fn more_text_than_opt_has_positions_for_is_refused_before_training() {
    let (tiny, language) = (TinyRun::new(), opt());
    let message = refused(train(&stage2(&tiny, language.path(), &[("/task/max_text_tokens", json!(89))]), &[]));
    let expected =
        "task.max_text_tokens: expected queries and text within the 96 positions of the language model, got 97";
    assert!(message.contains(expected), "{message}");
}

#[test]
fn sample_captions_end_where_opt_has_no_more_positions() {
    let (tiny, language) = (TinyRun::new(), opt());
    // 8 queries and 64 tokens of the 96 positions, and no end in sight.
    let prompt = vec!["t7"; 64].join(" ");
    let more = [("/model/language/prompt", json!(prompt)), ("/task/max_text_tokens", json!(80))];
    train(&stage2(&tiny, language.path(), &more), &[]).success();
    let metrics = fs::read_to_string(tiny.run("opt").join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().any(|line| line.contains("\"val_loss_lm\"")), "{metrics}");
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let (tiny, language) = (TinyRun::new(), opt());
    let path = language.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["one more"] = json!(120);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let message = refused(train(&stage2(&tiny, language.path(), &[]), &[]));
    assert!(message.contains("tokenizer.json: 121 tokens, but the model's vocabulary is 120"), "{message}");
}

#[test]
fn a_language_model_of_an_unknown_family_is_refused_with_the_known_ones() {
    let (tiny, language) = (TinyRun::new(), opt());
    let path = language.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["text_config"]["model_type"] = json!("mamba");
    fs::write(&path, config.to_string()).unwrap();
    let message = refused(train(&stage2(&tiny, language.path(), &[]), &[]));
    assert!(message.contains("text_config.model_type: got mamba, supported: opt, gpt2, llama"), "{message}");
}
