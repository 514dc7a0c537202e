//! Folders with a SentencePiece model instead of a `tokenizer.json`, against what `transformers` 4.57.1 converts them to
//! (scripts/fixtures/sentencepiece_models.py), and files that are none.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_data::{TextEncoder, TextError, converted_tokenizer};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name)
}

/// A folder with a model file and JSON files.
fn folder(file: &str, model: &[u8], files: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(file), model).unwrap();
    for (name, content) in files.as_object().unwrap() {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

fn encoder(folder: &Path) -> Result<TextEncoder, TextError> {
    TextEncoder::from_file(folder.join("tokenizer.json"), 4096, true)
}

#[test]
fn folders_become_the_tokenizers_that_transformers_makes_of_them() {
    let file: Value = serde_json::from_slice(&fs::read(golden("cases.json")).unwrap()).unwrap();
    let texts: Vec<&str> = file["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let model = fs::read(golden(&format!("{}.model", case["model"].as_str().unwrap()))).unwrap();
        let folder = folder(case["file"].as_str().unwrap(), &model, &case["files"]);

        let json = converted_tokenizer(folder.path()).unwrap().unwrap();
        let mut json: Value = serde_json::from_slice(&json).unwrap();
        let parts = json["model"].as_object_mut().unwrap();
        parts.remove("vocab").unwrap();
        parts.remove("merges");
        for (part, expected) in case["tokenizer"].as_object().unwrap() {
            assert_eq!(json[part], *expected, "{name}: {part}");
        }

        let encoder = encoder(folder.path()).unwrap();
        for ((text, ids), decoded) in
            texts.iter().zip(case["ids"].as_array().unwrap()).zip(case["decoded"].as_array().unwrap())
        {
            let got = encoder.encode(text).unwrap();
            assert_eq!(json!(got), *ids, "{name}: {text:?}");
            assert_eq!(encoder.decode(&got).unwrap(), decoded.as_str().unwrap_or(text), "{name}: {text:?}");
        }
    }
}

/// The classes' own files and the model that goes with them.
fn usual(class: &str) -> (&'static str, Vec<u8>, Value) {
    let (file, model) = match class {
        "T5Tokenizer" => ("spiece.model", "t5.model"),
        "GemmaTokenizer" => ("tokenizer.model", "gemma.model"),
        _ => ("tokenizer.model", "llama.model"),
    };
    (file, fs::read(golden(model)).unwrap(), json!({"tokenizer_config.json": {"tokenizer_class": class}}))
}

/// What is said of a folder that is not converted: one line.
fn refusal(file: &str, model: &[u8], files: &Value) -> String {
    let folder = folder(file, model, files);
    let message = encoder(folder.path()).err().unwrap().to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

/// A protocol buffer's field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn piece(text: &str, kind: u8) -> Vec<u8> {
    field(1, &[field(1, text.as_bytes()), vec![3 << 3, kind]].concat())
}

/// A model of few pieces with a trainer's and a normaliser's settings.
fn model(pieces: &[(&str, u8)], trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
    let pieces: Vec<u8> = pieces.iter().flat_map(|(text, kind)| piece(text, *kind)).collect();
    [pieces, field(2, trainer), field(3, normalizer)].concat()
}

const PIECES: [(&str, u8); 5] = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1), ("\u{2581}", 1)];
/// BPE.
const TRAINER: [u8; 2] = [3 << 3, 2];
/// Texts as they are.
const NORMALIZER: [u8; 2] = [4 << 3, 0];

#[test]
fn a_small_model_is_enough() {
    let (_, _, files) = usual("LlamaTokenizer");
    let folder = folder("tokenizer.model", &model(&PIECES, &TRAINER, &NORMALIZER), &files);
    assert_eq!(encoder(folder.path()).unwrap().encode("a a").unwrap(), [1, 4, 3, 4, 3]);
    assert_eq!(TextEncoder::from_folder(folder.path(), 16, false).unwrap().encode("a a").unwrap(), [4, 3, 4, 3]);
}

#[test]
fn files_that_are_no_model_are_refused() {
    let (file, whole, files) = usual("LlamaTokenizer");
    let damaged = |model: &[u8], expected: &str| {
        let message = refusal(file, model, &files);
        assert!(message.contains("tokenizer.model: ") && message.contains(expected), "{message}");
    };
    damaged(b"", "got one without them all; fetch it again");
    damaged(b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`");
    damaged(b"{\"model\": {}}", "got a damaged or other file");
    damaged(&[1 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0x0f], "got a damaged or other file");
    for length in (1..whole.len()).step_by(7) {
        damaged(&whole[..length], "fetch it again");
    }
    damaged(&model(&PIECES[1..], &TRAINER, &NORMALIZER), "expected one unknown piece, got 0");
    damaged(&model(&[PIECES[0], ("a", 2)], &TRAINER, &NORMALIZER), "expected one unknown piece, got 2");
    damaged(&model(&[PIECES[0], PIECES[0]], &TRAINER, &NORMALIZER), "expected one unknown piece, got 2");
    damaged(&model(&[PIECES[0], PIECES[3], PIECES[3]], &TRAINER, &NORMALIZER), "got \"a\" twice");
    damaged(&model(&[PIECES[0], ("", 1)], &TRAINER, &NORMALIZER), "piece 1: expected a text with a finite score");
    damaged(&model(&PIECES, &[3 << 3, 3], &NORMALIZER), "expected UNIGRAM or BPE, got WORD");
    damaged(&model(&PIECES, &[3 << 3, 4], &NORMALIZER), "expected UNIGRAM or BPE, got CHAR");
    damaged(&model(&PIECES[..2], &TRAINER, &[]), "normalizer_spec.remove_extra_whitespaces: expected false");
    damaged(&model(&PIECES, &TRAINER, &[3 << 3, 0, 4 << 3, 0]), "normalizer_spec.add_dummy_prefix: expected true");
}

#[test]
fn what_the_conversion_would_get_wrong_is_refused() {
    let (file, llama, files) = usual("LlamaTokenizer");
    let with = |name: &str, content: Value| {
        let mut files = files.clone();
        files[name] = content;
        refusal(file, &llama, &files)
    };
    for (class, expected) in [
        ("XLNetTokenizer", "tokenizer_class: expected LlamaTokenizer, GemmaTokenizer or T5Tokenizer"),
        ("PreTrainedTokenizerFast", "got PreTrainedTokenizerFast; save a tokenizer.json once with transformers"),
        ("T5Tokenizer", "spiece.model: No such file"),
        ("GemmaTokenizer", "normalizer_spec.add_dummy_prefix: expected false"),
    ] {
        let message = with("tokenizer_config.json", json!({"tokenizer_class": class}));
        assert!(message.contains(expected), "{message}");
    }
    let message = refusal(file, &llama, &json!({"config.json": {"model_type": "xlnet"}}));
    assert!(message.contains("config.json: model_type: expected llama, mistral"), "{message}");
    assert!(refusal(file, &llama, &json!({})).contains("tokenizer_config.json: tokenizer_class: expected"));

    let message = with("added_tokens.json", json!({"<|im|>": 461}));
    assert!(message.contains("added_tokens.json: \"<|im|>\": expected the id 460"), "{message}");
    for id in [json!(-1), json!(1u64 << 40), json!("460"), json!(1.5)] {
        let message = with("added_tokens.json", json!({"<|im|>": id}));
        assert!(message.contains("added_tokens.json: <|im|>: expected tokens"), "{message}");
    }
    for tokens in
        [json!({"4294967295": {"content": "x"}}), json!({"x": {"content": "x"}}), json!({"460": "x"}), json!([])]
    {
        let config = json!({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": tokens});
        let message = with("tokenizer_config.json", config);
        assert!(message.contains("tokenizer_config.json: "), "{message}");
    }
    let config = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": null});
    assert!(with("tokenizer_config.json", config).contains("expected a bos_token, got none"));
    let config = json!({"tokenizer_class": "LlamaTokenizer", "legacy": "no"});
    assert!(with("tokenizer_config.json", config).contains("legacy: expected true or false, got \"no\""));

    let (file, gemma, _) = usual("GemmaTokenizer");
    let config = json!({"tokenizer_class": "GemmaTokenizer", "pad_token": "<eos>"});
    let message = refusal(file, &gemma, &json!({"tokenizer_config.json": config}));
    assert!(message.contains("piece 0: expected the pad_token, <eos>, got <pad>"), "{message}");

    let (file, t5, _) = usual("T5Tokenizer");
    let t5_with = |key: &str, value: Value| {
        refusal(file, &t5, &json!({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", key: value}}))
    };
    assert!(t5_with("extra_ids", json!(1u64 << 60)).contains("extra_ids: expected a number up to 10000"));
    assert!(
        t5_with("additional_special_tokens", json!(["<extra_id_0>"])).contains("none or all of 100 extra_ids, got 1")
    );
    let (_, _, files) = usual("T5Tokenizer");
    // A unigram model whose trainer was told of another place of the unknown piece: field 40.
    let told = model(&PIECES, &[0xc0, 0x02, 0x7f], &[]);
    assert!(refusal(file, &told, &files).contains("expected the unknown piece at id 127, got it at 0"));
    assert!(
        refusal(file, &model(&PIECES, &[0x98, 0x02, 1], &[]), &files)
            .contains("trainer_spec.byte_fallback: expected false")
    );
    let endless = json!({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "eos_token": "<s>"}});
    assert!(refusal(file, &model(&PIECES[..2], &[], &[]), &endless).contains("expected the piece </s>, got none"));
}

#[test]
fn damaged_models_panic_nowhere() {
    for class in ["LlamaTokenizer", "GemmaTokenizer", "T5Tokenizer"] {
        let (file, whole, files) = usual(class);
        for seed in 0..400usize {
            let mut model = whole.clone();
            for turn in 0..3 {
                let place = (seed * 7919 + turn * 104_729) % model.len();
                model[place] = model[place].wrapping_add((seed % 255) as u8 + 1);
            }
            let folder = folder(file, &model, &files);
            if let Ok(encoder) = encoder(folder.path()) {
                for text in ["a dog  runs\n", "ﬁ ½ ＡＢ ｶﾞ e\u{301} 狗😀</s>"] {
                    let ids = encoder.encode(text).unwrap_or_default();
                    let _ = encoder.decode(&ids);
                }
            }
        }
    }
}
