//! What stands around a caption, by family of the language model.

use std::fs;
use std::path::PathBuf;

use blip2_data::{HostBatch, TextEncoder};
use blip2_model::language::LanguageConfig;
use blip2_trainer::batch::TargetRule;
use blip2_trainer::framed::FramedBatch;
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
    framed_caption(frame, "t11 t12").host.input_ids
}

fn framed_caption(frame: &TextFrame, caption: &str) -> FramedBatch {
    let input_ids: Vec<i64> = frame.encoder.encode(caption).unwrap().into_iter().map(i64::from).collect();
    let batch = HostBatch {
        position: 0,
        size: 1,
        image_size: 32,
        pixels: None,
        features: Vec::new(),
        lengths: vec![input_ids.len()],
        text_len: input_ids.len(),
        input_ids,
        sample_index: vec![0],
        image_id: vec![0],
        captions: vec![caption.into()],
        answers: vec![Vec::new()],
        positions: vec![0],
        epoch: 0,
    };
    frame.frame(batch, 1)
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
fn another_prompt_stands_where_the_run_s_stands_and_is_not_cut() {
    let (_folder, file) = tokenizer(20, true);
    let llama = config(json!({"model_type": "llama", "vocab_size": 20, "eos_token_id": 3}));
    let t5 = config(json!({"model_type": "t5", "vocab_size": 20, "eos_token_id": 1, "decoder_start_token_id": 0}));
    let LanguageConfig::T5(t5) = &t5 else { panic!("no T5") };
    let long = "t7 t8 t9 t7 t8 t9 t7 t8 t9";
    for (frame, first) in [
        (TextFrame::decoder(&file, 6, "t11", &opt()).unwrap(), vec![2]),
        (TextFrame::decoder(&file, 6, "t11", &llama).unwrap(), vec![]),
        (TextFrame::encoder_decoder(&file, 6, "t11", t5, None).unwrap(), vec![]),
    ] {
        let prompts = frame.prompts().unwrap();
        assert_eq!(prompts.ids("t11 ").unwrap(), frame.prompt(), "no space at its end");
        assert_eq!(prompts.ids(long).unwrap(), [first.as_slice(), &[7, 8, 9, 7, 8, 9, 7, 8, 9]].concat());
    }
}

/// GPT-2's kind of tokenizer: a word behind a space is another token than the same word at the beginning.
fn byte_level() -> (TempDir, PathBuf) {
    let tokens = [
        "a",
        "c",
        "f",
        "o",
        "t",
        "\u{120}",
        "\u{10a}",
        "ca",
        "cat",
        "of",
        "\u{120}a",
        "\u{120}cat",
        "\u{120}of",
        "</s>",
    ];
    let vocabulary: serde_json::Map<String, Value> = (0..).zip(tokens).map(|(id, t)| (t.into(), json!(id))).collect();
    let merges = ["c a", "ca t", "o f", "\u{120} cat", "\u{120} of", "\u{120} a"];
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "added_tokens": [],
        "pre_tokenizer": bytes, "decoder": bytes, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    (folder, path)
}

#[test]
fn prompt_and_caption_are_tokenised_as_one_text() {
    let (_folder, file) = byte_level();
    let alone = TextEncoder::from_file(&file, 99, false).unwrap();
    let joint: Vec<i64> = alone.encode("a of a cat").unwrap().into_iter().map(i64::from).collect();
    let (a, space_a, space_of, space_cat) = (0, 10, 12, 11);
    assert_eq!(joint, [a, space_of, space_a, space_cat]);
    let apart = [alone.encode("a of").unwrap(), alone.encode("a cat").unwrap()].concat();
    assert_ne!(apart.into_iter().map(i64::from).collect::<Vec<_>>(), joint);

    let opt = config(json!({"model_type": "opt", "vocab_size": 20, "bos_token_id": 13, "eos_token_id": 13}));
    let llama = config(json!({"model_type": "llama", "vocab_size": 20, "eos_token_id": 13}));
    for (language, first, end) in [(&opt, vec![13], 6), (&llama, vec![], 13)] {
        for prompt in ["a of", "a of "] {
            let frame = TextFrame::decoder(&file, 12, prompt, language).unwrap();
            let framed = framed_caption(&frame, "a cat");
            assert_eq!(framed.host.input_ids, [first.as_slice(), &joint, &[end]].concat());
            assert_eq!(frame.prompt(), [first.as_slice(), &[a, space_of]].concat(), "what generation begins with");
            let labels = framed.labels(TargetRule { untargeted: frame.untargeted() });
            assert_eq!(labels[first.len()..], [-100, -100, space_a, space_cat, end]);
        }
        let bare = framed_caption(&TextFrame::decoder(&file, 12, "", language).unwrap(), "a cat");
        assert_eq!(bare.host.input_ids, [first.as_slice(), &[a, space_cat, end]].concat());
        // All of it is cut together, and the prompt stays whole.
        let short = TextFrame::decoder(&file, 4 + first.len(), "a of", language).unwrap();
        assert_eq!(framed_caption(&short, "a cat").host.input_ids, [first.as_slice(), &joint[..3], &[end]].concat());
    }
    let line = TextFrame::decoder(&file, 12, "of\n", &llama).unwrap();
    assert_eq!(framed_caption(&line, "a cat").host.input_ids, [9, 6, a, space_cat, 13], "no space behind a line break");
}

#[test]
fn an_encoder_decoder_splits_the_joint_text_behind_the_prompt() {
    let (_folder, file) = byte_level();
    let t5 = config(json!({"model_type": "t5", "vocab_size": 20, "eos_token_id": 13, "decoder_start_token_id": 0}));
    let LanguageConfig::T5(t5) = &t5 else { panic!("no T5") };
    let (a, space_a, space_of, space_cat) = (0, 10, 12, 11);
    let split = framed_caption(&TextFrame::encoder_decoder(&file, 12, "a of", t5, Some(1)).unwrap(), "a cat");
    assert_eq!(split.host.input_ids, [a, space_of, space_a], "the prefix of two tokens is the first");
    assert_eq!(split.written.unwrap().ids, [space_cat, 13]);
    // Unsplit, the decoder writes a text of its own.
    let whole = framed_caption(&TextFrame::encoder_decoder(&file, 12, "a of", t5, None).unwrap(), "a cat");
    assert_eq!((whole.host.input_ids, whole.written.unwrap().ids), (vec![a, space_of], vec![a, space_cat, 13]));
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
