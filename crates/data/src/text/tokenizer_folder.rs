//! The files of a tokenizer's folder beside `tokenizer.json`: names of special tokens, BERT's older `vocab.txt`, and what else stands in for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::shards::scan::LFS_POINTER;
use crate::text::TextError;
use crate::text::{gpt2_files, sentencepiece};

/// The special tokens by which a BERT's tokenizer frames and fills texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Fills texts to one length; `[PAD]`.
    pub pad: String,
    /// Stands for what the vocabulary lacks; `[UNK]`.
    pub unknown: String,
    /// Begins a text; `[CLS]`.
    pub begin: String,
    /// Ends a text; `[SEP]`.
    pub end: String,
    /// Stands for a hidden word; `[MASK]`.
    pub mask: String,
}

impl SpecialTokens {
    /// The names in `special_tokens_map.json`, else in `tokenizer_config.json`, else BERT's own.
    ///
    /// # Errors
    /// A file that cannot be read or does not parse, a name that is no text.
    pub fn of(folder: &Path) -> Result<SpecialTokens, TextError> {
        let files = ["special_tokens_map.json", "tokenizer_config.json"].map(|name| (name, read_object(folder, name)));
        let mut named = Vec::new();
        for (name, object) in files {
            named.push((name, object?));
        }
        let token = |role: &str, default: &str| {
            for (file, object) in &named {
                match object.get(role) {
                    None | Some(Value::Null) => continue,
                    Some(Value::String(token)) => return Ok(token.clone()),
                    // As the tokenizers library writes it, with its options.
                    Some(Value::Object(token)) if token.get("content").is_some_and(Value::is_string) => {
                        return Ok(token["content"].as_str().unwrap_or_default().to_string());
                    }
                    Some(other) => {
                        let reason = format!("{role}: expected a text, got {other}");
                        return Err(TextError::Load { path: folder.join(file), reason });
                    }
                }
            }
            Ok(default.to_string())
        };
        Ok(SpecialTokens {
            pad: token("pad_token", "[PAD]")?,
            unknown: token("unk_token", "[UNK]")?,
            begin: token("cls_token", "[CLS]")?,
            end: token("sep_token", "[SEP]")?,
            mask: token("mask_token", "[MASK]")?,
        })
    }
}

/// The `tokenizer.json` of a folder that has none but GPT-2's files or a SentencePiece model; `None` where nothing is to be made.
///
/// # Errors
/// Files that cannot be read or do not fit each other; a model of another kind than is converted.
pub fn converted_tokenizer(folder: &Path) -> Result<Option<Vec<u8>>, TextError> {
    let path = folder.join("tokenizer.json");
    let json = if path.exists() {
        return Ok(None);
    } else if gpt2_files::present(folder) {
        gpt2_files::tokenizer_json(folder).map_err(|reason| TextError::Load { path, reason })?
    } else if sentencepiece::present(folder) {
        sentencepiece::tokenizer_json(folder)?
    } else {
        return Ok(None);
    };
    Ok(Some(json.to_string().into_bytes()))
}

/// The bytes of `tokenizer.json`; of a folder that has only other files, or a BERT's `vocab.txt`, what `transformers` would write for it.
///
/// # Errors
/// Neither file, files that cannot be read, a vocabulary without one of the special tokens, or one that is read by another class than BERT's.
pub(crate) fn tokenizer_json(folder: &Path) -> Result<Vec<u8>, TextError> {
    if let Some(json) = converted_tokenizer(folder)? {
        return Ok(json);
    }
    let path = folder.join("tokenizer.json");
    let load = |reason: String| TextError::Load { path: path.clone(), reason };
    let vocabulary_path = folder.join("vocab.txt");
    if path.exists() || !vocabulary_path.exists() {
        return fs::read(&path).map_err(|error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            load(if missing { "no such file, and no vocab.txt beside it".to_owned() } else { error.to_string() })
        });
    }
    let in_vocabulary = |reason: String| TextError::Load { path: vocabulary_path.clone(), reason };
    let bytes = fs::read(&vocabulary_path).map_err(|error| in_vocabulary(error.to_string()))?;
    if bytes.starts_with(LFS_POINTER) {
        return Err(in_vocabulary("it is a Git LFS pointer, not the file; run `git lfs pull`".to_owned()));
    }
    let text = String::from_utf8(bytes).map_err(|_| in_vocabulary("it is not UTF-8".to_owned()))?;
    // A token may itself be white space: only the line's end is taken off.
    let vocabulary: BTreeMap<&str, usize> =
        text.split_terminator('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).zip(0..).collect();
    let special = SpecialTokens::of(folder)?;
    let options = read_object(folder, "tokenizer_config.json")?;
    check_class(folder, &options)?;
    let flag = |key: &str| options.get(key).and_then(Value::as_bool);
    let id = |token: &str| {
        let missing =
            || in_vocabulary(format!("it lacks the special token {token}, which tokenizer_config.json names"));
        vocabulary.get(token).copied().ok_or_else(missing)
    };
    let mut added = Vec::new();
    for token in [&special.pad, &special.unknown, &special.begin, &special.end, &special.mask] {
        added.push(json!({
            "id": id(token)?, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
        }));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars").unwrap_or(true),
            "strip_accents": flag("strip_accents"),
            "lowercase": flag("do_lower_case").unwrap_or(true),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing", "sep": [special.end, id(&special.end)?], "cls": [special.begin, id(&special.begin)?],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": special.unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    });
    Ok(tokenizer.to_string().into_bytes())
}

/// Whether `vocab.txt` is read by BERT's own classes. Others split words in ways of their own (Japanese ones by a dictionary, MeCab's).
fn check_class(folder: &Path, options: &Map<String, Value>) -> Result<(), TextError> {
    let model = read_object(folder, "config.json")?;
    let known = [
        ("tokenizer_config.json", options, "tokenizer_class", &["BertTokenizer", "BertTokenizerFast"][..]),
        ("tokenizer_config.json", options, "word_tokenizer_type", &["basic"]),
        ("tokenizer_config.json", options, "subword_tokenizer_type", &["wordpiece"]),
        ("config.json", &model, "tokenizer_class", &["BertTokenizer", "BertTokenizerFast"]),
    ];
    for (file, object, key, expected) in known {
        let got = object.get(key).filter(|value| !value.is_null());
        if let Some(got) = got.filter(|got| !got.as_str().is_some_and(|got| expected.contains(&got))) {
            let reason = format!(
                "{key}: expected {} beside a vocab.txt without a tokenizer.json, got {got}; take a BERT with a tokenizer.json",
                expected.join(" or ")
            );
            return Err(TextError::Load { path: folder.join(file), reason });
        }
    }
    Ok(())
}

/// A JSON object of the folder; empty where the file is not there.
pub(crate) fn read_object(folder: &Path, name: &str) -> Result<Map<String, Value>, TextError> {
    let path = folder.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(TextError::Load { path, reason: error.to_string() }),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(TextError::Load { path, reason: "expected an object".to_owned() }),
        Err(error) => Err(TextError::Load { path, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TextEncoder;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
        folder
    }

    #[test]
    fn names_of_special_tokens_follow_the_files_in_order() {
        let bert = folder(&[]);
        let default = SpecialTokens::of(bert.path()).unwrap();
        assert_eq!((default.pad.as_str(), default.begin.as_str(), default.end.as_str()), ("[PAD]", "[CLS]", "[SEP]"));
        let other = folder(&[
            ("special_tokens_map.json", r#"{"pad_token": {"content": "<pad>", "lstrip": false}, "cls_token": "<s>"}"#),
            ("tokenizer_config.json", r#"{"pad_token": "[PAD]", "sep_token": "</s>", "mask_token": null}"#),
        ]);
        let found = SpecialTokens::of(other.path()).unwrap();
        assert_eq!((found.pad.as_str(), found.begin.as_str(), found.end.as_str()), ("<pad>", "<s>", "</s>"));
        assert_eq!(found.mask, "[MASK]");
        let wrong = folder(&[("special_tokens_map.json", r#"{"pad_token": 3}"#)]);
        let message = SpecialTokens::of(wrong.path()).unwrap_err().to_string();
        assert!(message.ends_with("special_tokens_map.json: pad_token: expected a text, got 3"), "{message}");
    }

    const VOCABULARY: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nein\nhund\n##e\nHund\n中\n国\n";

    #[test]
    fn a_vocabulary_alone_makes_a_tokenizer() {
        let bert = folder(&[("vocab.txt", VOCABULARY)]);
        let text = TextEncoder::from_folder(bert.path(), 16, true).unwrap();
        assert_eq!(text.encode("Ein Hunde, 中国").unwrap(), [2, 5, 6, 7, 1, 9, 10, 3]);
        assert_eq!(text.decode(&[2, 5, 6, 7, 3]).unwrap(), "ein hunde");
        assert_eq!((text.vocab_size(), text.token_id("[PAD]")), (11, Some(0)));
        let cased = folder(&[("vocab.txt", VOCABULARY), ("tokenizer_config.json", r#"{"do_lower_case": false}"#)]);
        let text = TextEncoder::from_folder(cased.path(), 16, true).unwrap();
        assert_eq!(text.encode("ein Hund").unwrap(), [2, 5, 8, 3]);
    }

    #[test]
    fn a_vocabulary_that_another_class_reads_is_refused() {
        let read = |file, options: &str| {
            let bert = folder(&[("vocab.txt", VOCABULARY), (file, options)]);
            TextEncoder::from_folder(bert.path(), 16, true).map(drop).map_err(|error| error.to_string())
        };
        for (file, options, expected) in [
            (
                "tokenizer_config.json",
                r#"{"do_lower_case": false, "word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece"}"#,
                "tokenizer_config.json: word_tokenizer_type: expected basic beside a vocab.txt",
            ),
            (
                "tokenizer_config.json",
                r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#,
                "tokenizer_class: expected BertTokenizer or BertTokenizerFast beside a vocab.txt",
            ),
            ("tokenizer_config.json", r#"{"subword_tokenizer_type": "character"}"#, "expected wordpiece beside"),
            ("config.json", r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#, "/config.json: tokenizer_class: "),
        ] {
            let message = read(file, options).unwrap_err();
            assert!(message.contains(expected) && message.ends_with("take a BERT with a tokenizer.json"), "{message}");
        }
        for options in
            [r#"{"tokenizer_class": null}"#, r#"{"tokenizer_class": "BertTokenizer", "word_tokenizer_type": "basic"}"#]
        {
            assert_eq!(read("tokenizer_config.json", options), Ok(()));
        }
        assert_eq!(read("config.json", r#"{"model_type": "bert", "tokenizer_class": null}"#), Ok(()));
    }

    #[test]
    fn a_vocabulary_without_its_special_tokens_is_refused() {
        let bert = folder(&[("vocab.txt", "a\nb\n")]);
        let message = TextEncoder::from_folder(bert.path(), 16, true).err().unwrap().to_string();
        assert!(message.contains("vocab.txt: it lacks the special token [PAD]"), "{message}");
        let message = TextEncoder::from_folder(folder(&[]).path(), 16, true).err().unwrap().to_string();
        assert!(message.contains("tokenizer.json: no such file, and no vocab.txt beside it"), "{message}");
    }
}
