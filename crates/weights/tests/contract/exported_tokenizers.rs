//! The tokenizer of an export: `<image>` where there is room, and files that `AutoTokenizer` reads rightly.

use std::fs;
use std::path::Path;

use blip2_weights::{Export, ExportTask, ModelDir, image_token_index, is_pad_token};
use serde_json::{Value, json};

use crate::exports::{export, read_json, stage2_task, trained};
use crate::fixtures::golden;

/// Eight words, of which the first four are special.
fn tokenizer() -> Value {
    let words = ["<s>", "</s>", "<unk>", "<spare>", "a", "red", "apple", "tree"];
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().zip(0..).map(|(w, id)| (w.to_string(), json!(id))).collect();
    let special = words[..4].iter().zip(0..).map(|(word, id)| {
        json!({"id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": special.collect::<Vec<_>>(), "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    })
}

fn folder(tokenizer: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

fn text_config() -> Value {
    json!({"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": null})
}

fn index(tokenizer: &Value, inherited: Option<i64>, vocabulary: i64) -> Option<i64> {
    image_token_index(folder(tokenizer).path(), &text_config(), inherited, vocabulary).unwrap()
}

#[test]
fn the_image_token_is_inherited_named_next_or_spare() {
    assert_eq!(index(&tokenizer(), Some(5), 8), Some(5));
    assert_eq!(index(&tokenizer(), None, 9), Some(8), "the first row behind the tokenizer's last");
    let mut named = tokenizer();
    named["model"]["vocab"]["<image>"] = json!(8);
    assert_eq!(index(&named, None, 12), Some(8));
    assert_eq!(index(&tokenizer(), None, 8), Some(3), "no row left: what no text gives and the model does not use");
    let mut all_used = tokenizer();
    all_used["added_tokens"].as_array_mut().unwrap().truncate(3);
    assert_eq!(index(&all_used, None, 8), None);
    let pairs = json!([["<s>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u{2581}a", -1.5]]);
    let unigram = json!({"added_tokens": [], "model": {"type": "Unigram", "unk_id": 2, "vocab": pairs}});
    assert_eq!(index(&unigram, None, 32), Some(4));
}

#[test]
fn the_unknown_token_holds_the_queries_where_no_text_gives_it() {
    // Llama 2's: every id taken, every special token with a role.
    let mut llama = tokenizer();
    llama["added_tokens"].as_array_mut().unwrap().truncate(3);
    assert_eq!(index(&llama, None, 8), None, "a word that the vocabulary lacks gives it");
    llama["model"]["byte_fallback"] = json!(true);
    assert_eq!(index(&llama, None, 8), Some(2));
    assert_eq!(index(&llama, None, 9), Some(8), "a row of its own is better");
    let free = |text_config: Value| image_token_index(folder(&llama).path(), &text_config, None, 8).unwrap();
    // Vicuna's fills batches; one that ends texts ends them too early.
    assert_eq!(free(json!({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})), Some(2));
    assert_eq!(free(json!({"bos_token_id": 0, "eos_token_id": [1, 2]})), None);

    let pads = |text_config: Value, config: Option<Value>| {
        let folder = folder(&llama);
        config.iter().for_each(|c| fs::write(folder.path().join("tokenizer_config.json"), c.to_string()).unwrap());
        is_pad_token(folder.path(), &text_config, 2).unwrap()
    };
    assert!(pads(json!({"pad_token_id": 2}), None));
    assert!(pads(json!({}), Some(json!({"pad_token": "<unk>"}))));
    assert!(pads(json!({}), Some(json!({"pad_token": {"content": "<unk>"}}))));
    assert!(!pads(json!({"pad_token_id": 0}), Some(json!({"pad_token": "</s>"}))));
    assert!(!pads(json!({}), None));
}

fn exported(tokenizer: &Path, image_token_index: Option<i64>) -> tempfile::TempDir {
    let model = ModelDir::open(&golden("stage2_llama")).unwrap();
    let trained = trained(&model);
    let task = match stage2_task(&model) {
        ExportTask::Stage2 { language, text_config, before_queries, .. } => {
            ExportTask::Stage2 { language, text_config, before_queries, image_token_index }
        }
        other => other,
    };
    let out = tempfile::tempdir().unwrap();
    Export { tokenizer: Some(tokenizer), ..export(task, &trained, &model) }.write(&out.path().join("out")).unwrap();
    out
}

#[test]
fn the_image_token_is_added_and_nothing_else_changes() {
    let given = folder(&tokenizer());
    let out = exported(given.path(), Some(8));
    let written = read_json(out.path().join("out/tokenizer.json"));
    let mut expected = tokenizer();
    let image = json!({"id": 8, "content": "<image>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    expected["added_tokens"].as_array_mut().unwrap().push(image);
    assert_eq!(written, expected);
    assert_eq!(read_json(out.path().join("out/processor_config.json"))["num_query_tokens"], 8);

    // Exported once more, it is there already.
    let again = exported(&out.path().join("out"), Some(8));
    assert_eq!(read_json(again.path().join("out/tokenizer.json")), expected);
}

#[test]
fn ids_with_gaps_leave_the_queries_one_that_no_word_has() {
    let mut gaps = tokenizer();
    gaps["model"]["vocab"]["tree"] = json!(8);
    assert_eq!(index(&gaps, None, 12), Some(9), "eight tokens, but 8 is taken");
    // A tokenizer would give the next token another id.
    let given = folder(&gaps);
    let out = exported(given.path(), Some(9));
    assert!(!out.path().join("out/processor_config.json").exists());
    assert_eq!(read_json(out.path().join("out/tokenizer.json")), gaps);
}

#[test]
fn a_processor_is_written_only_where_it_would_place_the_queries() {
    let given = folder(&tokenizer());
    for index in [Some(2), Some(6), Some(9), None] {
        let out = exported(given.path(), index);
        assert!(!out.path().join("out/processor_config.json").exists(), "{index:?}");
        assert_eq!(read_json(out.path().join("out/tokenizer.json")), tokenizer());
    }
}

#[test]
fn a_spare_token_takes_the_name_of_the_image_token_wherever_it_stands() {
    let given = folder(&tokenizer());
    let map = json!({"additional_special_tokens": ["<spare>"], "unk_token": "<unk>"});
    fs::write(given.path().join("special_tokens_map.json"), map.to_string()).unwrap();
    let out = exported(given.path(), Some(3));
    assert_eq!(read_json(out.path().join("out/processor_config.json"))["num_query_tokens"], 8);
    let written = read_json(out.path().join("out/tokenizer.json"));
    assert_eq!(
        (&written["added_tokens"][3]["content"], &written["model"]["vocab"]["<image>"]),
        (&json!("<image>"), &json!(3))
    );
    assert!(!written.to_string().contains("<spare>"));
    let map = read_json(out.path().join("out/special_tokens_map.json"));
    assert_eq!(map, json!({"additional_special_tokens": ["<image>"], "unk_token": "<unk>"}));

    // Not where texts are framed with it.
    let mut framed = tokenizer();
    framed["post_processor"] = json!({"type": "BertProcessing", "sep": ["<spare>", 3], "cls": ["<s>", 0]});
    let out = exported(folder(&framed).path(), Some(3));
    assert!(!out.path().join("out/processor_config.json").exists());
    assert_eq!(read_json(out.path().join("out/tokenizer.json")), framed);
}

#[test]
fn a_tokenizer_without_its_class_is_not_taken_for_another() {
    let given = folder(&tokenizer());
    let out = exported(given.path(), Some(8));
    let config = read_json(out.path().join("out/tokenizer_config.json"));
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!([&config["bos_token"], &config["eos_token"], &config["unk_token"]], ["<s>", "</s>", "<unk>"]);
    assert!(config.get("pad_token").is_none(), "{config}");
    let own = json!({"tokenizer_class": "LlamaTokenizer"});
    fs::write(given.path().join("tokenizer_config.json"), own.to_string()).unwrap();
    let out = exported(given.path(), Some(8));
    assert_eq!(read_json(out.path().join("out/tokenizer_config.json")), own);
}

#[test]
fn a_vocabulary_with_scores_is_copied_byte_by_byte() {
    let unigram = json!({"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["\u{2581}a", -13.837_410_926_818_848]]}});
    let given = folder(&unigram);
    let out = exported(given.path(), Some(2));
    let bytes = |folder: &Path| fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(bytes(&out.path().join("out")), bytes(given.path()));
    assert_eq!(read_json(out.path().join("out/processor_config.json"))["num_query_tokens"], 8);
}
