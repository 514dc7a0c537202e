//! GPT-2's tokenizer files, `vocab.json` and `merges.txt`: what OPT's directories have instead of a `tokenizer.json`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

const FILES: [&str; 2] = ["vocab.json", "merges.txt"];

/// Whether a folder has them.
pub(crate) fn present(folder: &Path) -> bool {
    FILES.iter().all(|name| folder.join(name).is_file())
}

/// The `tokenizer.json` that says the same, as `transformers` converts them: byte-level BPE, and BOS in front of every text where
/// `tokenizer_config.json` has `add_bos_token`.
pub(crate) fn tokenizer_json(folder: &Path) -> Result<Value, String> {
    let vocabulary = read_json(folder, FILES[0])?;
    let merges = fs::read_to_string(folder.join(FILES[1])).map_err(|error| format!("{}: {error}", FILES[1]))?;
    let merges: Vec<&str> =
        merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty()).collect();
    let configs: Vec<Value> = ["tokenizer_config.json", "special_tokens_map.json"]
        .iter()
        .filter(|name| folder.join(name).is_file())
        .map(|name| read_json(folder, name))
        .collect::<Result<_, _>>()?;
    let flag = |key: &str| configs.iter().any(|config| config[key] == true);
    let token = |role: &str| {
        let values = configs.iter().map(|config| &config[role]);
        values.filter_map(|value| value.as_str().or(value["content"].as_str())).next().map(str::to_string)
    };
    let mut added: Vec<(i64, String)> = Vec::new();
    for role in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        let Some(content) = token(role) else { continue };
        let Some(id) = vocabulary[&content].as_i64() else {
            return Err(format!("{}: expected the {role} {content:?}, got no such entry", FILES[0]));
        };
        if !added.iter().any(|(_, other)| *other == content) {
            added.push((id, content));
        }
    }
    added.sort();
    let bos = token("bos_token").filter(|_| flag("add_bos_token"));
    let byte_level = |add_prefix_space: bool, trim_offsets: bool| json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": true});
    let post_processor = match bos {
        None => byte_level(true, false),
        Some(bos) => {
            let part = json!([{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
            let id = vocabulary[&bos].as_i64();
            let special = json!({bos.clone(): {"id": bos, "ids": [id], "tokens": [bos]}});
            json!({"type": "TemplateProcessing", "single": part, "pair": part, "special_tokens": special})
        }
    };
    let added: Vec<Value> = added.into_iter().map(|(id, content)| added_token(id, &content)).collect();
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level(flag("add_prefix_space"), true),
        "post_processor": post_processor,
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": merges,
        },
    }))
}

fn added_token(id: i64, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": true})
}

fn read_json(folder: &Path, name: &str) -> Result<Value, String> {
    let bytes = fs::read(folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| format!("{name}: invalid JSON: {error}"))?;
    if value.is_object() { Ok(value) } else { Err(format!("{name}: expected an object")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TextEncoder;

    /// OPT's files in small.
    fn opt() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        let tokens =
            ["<s>", "<pad>", "</s>", "<unk>", "a", "c", "t", "\u{120}", "at", "\u{120}c", "\u{120}cat", "\u{10a}"];
        let vocabulary: serde_json::Map<String, Value> =
            tokens.iter().zip(0..).map(|(t, id)| (t.to_string(), json!(id))).collect();
        write("vocab.json", json!(vocabulary).to_string());
        write("merges.txt", "#version: 0.2\na t\n\u{120} c\n\u{120}c at\n".into());
        let end = json!({"content": "</s>", "normalized": true});
        let config =
            json!({"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>", "add_bos_token": true});
        write("tokenizer_config.json", config.to_string());
        folder
    }

    #[test]
    fn texts_become_the_ids_that_transformers_gives() {
        // transformers 4.57.1, AutoTokenizer of the same files.
        let folder = opt();
        let encoder = |special| TextEncoder::from_file(folder.path().join("tokenizer.json"), 16, special).unwrap();
        for (text, ids) in
            [("a cat", &[4, 10][..]), ("cat cat\n", &[5, 8, 10, 11]), ("", &[]), ("\n", &[11]), ("</s>a", &[2, 4])]
        {
            assert_eq!(encoder(false).encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(encoder(true).encode(text).unwrap(), [&[2], ids].concat(), "{text:?}");
        }
        assert_eq!(encoder(true).decode(&[2, 4, 10]).unwrap(), "a cat");
        assert_eq!(encoder(true).vocab_size(), 12);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = opt();
        let load = || TextEncoder::from_file(folder.path().join("tokenizer.json"), 16, true).err().unwrap().to_string();
        fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<end>"}"#).unwrap();
        assert!(load().ends_with("vocab.json: expected the eos_token \"<end>\", got no such entry"), "{}", load());
        fs::write(folder.path().join("vocab.json"), "[]").unwrap();
        assert!(load().ends_with("vocab.json: expected an object"), "{}", load());
        fs::remove_file(folder.path().join("merges.txt")).unwrap();
        assert!(load().contains("tokenizer.json"), "{}", load());
    }
}
