//! What stands around a caption, by family of the language model.

use std::fs;
use std::path::PathBuf;

use blip2_data::HostBatch;
use blip2_model::language::LanguageConfig;
use blip2_trainer::text::TextFrame;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tokenizer of words between spaces: `t0 t1 ..`, of which the fifth is a line break where asked for.
fn tokenizer(words: i64, line_break: bool) -> (TempDir, PathBuf) {
    let word = |id: i64| if line_break && id == 5 { "\n".to_string() } else { format!("t{id}") };
    let vocabulary: serde_json::Map<String, Value> = (0..words).map(|id| (word(id), json!(id))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null, "post_processor": null,
        "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": false},
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    (folder, path)
}

fn config(json: Value) -> LanguageConfig {
    LanguageConfig::from_json(&json).unwrap()
}

fn opt() -> LanguageConfig {
    config(json!({"model_type": "opt", "vocab_size": 20}))
}

/// One caption of two tokens, framed.
fn framed(frame: &TextFrame) -> Vec<i64> {
    let batch = HostBatch {
        position: 0,
        size: 1,
        image_size: 32,
        pixels: None,
        features: Vec::new(),
        input_ids: vec![11, 12],
        lengths: vec![2],
        text_len: 2,
        sample_index: vec![0],
        image_id: vec![0],
        captions: vec!["t11 t12".into()],
        positions: vec![0],
        epoch: 0,
    };
    frame.frame(batch, 1).host.input_ids
}

#[test]
fn opt_s_captions_begin_with_bos_and_end_with_a_line_break() {
    let (_folder, file) = tokenizer(20, true);
    let frame = TextFrame::decoder(&file, 12, "", &opt()).unwrap();
    assert_eq!(framed(&frame), [2, 11, 12, 5]);
    assert_eq!((frame.prompt(), frame.untargeted()), (vec![2], 0), "without a prompt </s> is a target");
    assert_eq!(frame.end_tokens(), [5, 2]);
    let frame = TextFrame::decoder(&file, 12, "t7 t8", &opt()).unwrap();
    assert_eq!(framed(&frame), [2, 7, 8, 11, 12, 5]);
    assert_eq!(frame.untargeted(), 3);
}

#[test]
fn other_decoders_end_with_eos_and_have_no_bos_in_the_text() {
    let (_folder, file) = tokenizer(20, false);
    let llama = config(json!({"model_type": "llama", "vocab_size": 20, "eos_token_id": [3, 4]}));
    let frame = TextFrame::decoder(&file, 12, "t7", &llama).unwrap();
    assert_eq!(framed(&frame), [7, 11, 12, 3]);
    assert_eq!((frame.untargeted(), frame.end_tokens()), (1, &[3, 4][..]));
}

#[test]
fn a_tokenizer_that_does_not_suit_the_model_is_refused() {
    let refused = |file: &PathBuf, config: &LanguageConfig, prompt: &str| {
        TextFrame::decoder(file, 6, prompt, config).err().unwrap().to_string()
    };
    let (_folder, larger) = tokenizer(21, true);
    let message = refused(&larger, &opt(), "");
    assert!(message.contains("tokenizer.json: 21 tokens, but the model's vocabulary is 20"), "{message}");
    let (_folder, broken) = tokenizer(20, false);
    let message = refused(&broken, &opt(), "");
    assert!(
        message.contains("end with a line break, which must be one token of the tokenizer; it is [0]"),
        "{message}"
    );
    let qwen = config(json!({"model_type": "qwen2", "vocab_size": 20}));
    let message = refused(&broken, &qwen, "");
    assert!(message.contains("config.json: eos_token_id: expected an id, got none"), "{message}");
    let (_folder, file) = tokenizer(20, true);
    let message = refused(&file, &opt(), "t7 t8 t9 t10");
    assert!(message.contains("model.language.prompt: takes 5 of task.max_text_tokens (6)"), "{message}");
}

#[test]
fn special_tokens_beyond_the_vocabulary_are_spelled_out() {
    let (_folder, file) = tokenizer(20, true);
    let mut json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let image = |special: bool| json!([{"id": 20, "content": "<image>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special}]);
    json["added_tokens"] = image(true);
    fs::write(&file, json.to_string()).unwrap();
    let frame = TextFrame::decoder(&file, 12, "", &opt()).unwrap();
    assert_eq!(frame.encoder.encode("t7 <image> t8").unwrap(), [7, 0, 8], "an unknown word, not the token 20");
    json["added_tokens"] = image(false);
    fs::write(&file, json.to_string()).unwrap();
    let message = TextFrame::decoder(&file, 12, "", &opt()).err().unwrap().to_string();
    assert!(message.contains("21 tokens, but the model's vocabulary is 20"), "{message}");
}
