//! The tokenizer classes whose SentencePiece models are converted, and in what their conversions differ.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::normalizers::precompiled::Precompiled;

use super::model_file::Model;
use crate::text::TextError;
use crate::text::tokenizer_folder::read_object;

/// What to do about what is not converted here.
pub(super) const SAVE_ONCE: &str =
    "save a tokenizer.json once with transformers (AutoTokenizer.from_pretrained, save_pretrained)";
/// SentencePiece's space.
const SPACE: &str = "\u{2581}";
/// More than any T5 has.
const MAX_EXTRA_IDS: u64 = 10_000;

/// Classes of `transformers`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// `LlamaTokenizer`: Llama 1 and 2, Vicuna, Mistral.
    Llama,
    /// `GemmaTokenizer`.
    Gemma,
    /// `T5Tokenizer`.
    T5,
}

impl Family {
    /// The class that `transformers` would choose: the one that `tokenizer_config.json` names, else `config.json`, else that of its kind of model.
    ///
    /// # Errors
    /// Another class or none; files that do not parse.
    pub(super) fn of(folder: &Path, tokenizer_config: &Map<String, Value>) -> Result<Family, TextError> {
        let config = read_object(folder, "config.json")?;
        let named = [
            ("tokenizer_config.json", "tokenizer_class", tokenizer_config),
            ("config.json", "tokenizer_class", &config),
            ("config.json", "model_type", &config),
        ];
        let found = named.into_iter().find_map(|(file, key, object)| Some((file, key, object.get(key)?.as_str()?)));
        let (file, key, value) = found.unwrap_or(("tokenizer_config.json", "tokenizer_class", "none"));
        let family = match (key, value.strip_suffix("Fast").unwrap_or(value)) {
            ("tokenizer_class", "LlamaTokenizer") | ("model_type", "llama" | "mistral") => Family::Llama,
            ("tokenizer_class", "GemmaTokenizer") | ("model_type", "gemma" | "gemma2" | "gemma3_text") => Family::Gemma,
            ("tokenizer_class", "T5Tokenizer") | ("model_type", "t5") => Family::T5,
            _ => {
                let expected = match key {
                    "model_type" => "llama, mistral, gemma, gemma2, gemma3_text or t5",
                    _ => "LlamaTokenizer, GemmaTokenizer or T5Tokenizer",
                };
                let reason = format!(
                    "{key}: expected {expected} for a SentencePiece model without a tokenizer.json, got {value}; {SAVE_ONCE}"
                );
                return Err(TextError::Load { path: folder.join(file), reason });
            }
        };
        Ok(family)
    }

    /// The name of its model file.
    pub(super) fn file(self) -> &'static str {
        match self {
            Family::Llama | Family::Gemma => "tokenizer.model",
            Family::T5 => "spiece.model",
        }
    }

    /// The token of a role that no file names.
    pub(super) fn default_token(self, role: &str) -> Option<&'static str> {
        match (self, role) {
            (_, "unk_token") => Some("<unk>"),
            (Family::Llama, "bos_token") => Some("<s>"),
            (Family::Llama | Family::T5, "eos_token") => Some("</s>"),
            (Family::Gemma, "bos_token") => Some("<bos>"),
            (Family::Gemma, "eos_token") => Some("<eos>"),
            (Family::Gemma | Family::T5, "pad_token") => Some("<pad>"),
            _ => None,
        }
    }

    /// Whether the class gives options to a role's token of which a file has the name alone.
    pub(super) fn gives_options(self, role: &str) -> bool {
        matches!(role, "eos_token" | "unk_token" | "pad_token") || (role == "bos_token" && self != Family::T5)
    }

    /// Whether a symbol of the model is special though the model does not say so.
    pub(super) fn calls_special(self, piece: &str) -> bool {
        self == Family::Gemma && matches!(piece, "<start_of_turn>" | "<end_of_turn>")
    }

    /// Refuses a model that says of itself what the conversion of its class does not do: its texts would become other ids than it was
    /// trained with.
    ///
    /// # Errors
    /// What the model says, and what the conversion does.
    pub(super) fn check(self, model: &Model, options: &Options) -> Result<(), String> {
        let of_t5 = self == Family::T5;
        // A configuration may ask for no space in front; it cannot ask the model for one.
        let prefix = if self == Family::Gemma { Some(false) } else { options.add_prefix_space.then_some(true) };
        let told = [
            ("normalizer_spec.add_dummy_prefix", prefix, model.add_dummy_prefix),
            ("normalizer_spec.remove_extra_whitespaces", Some(of_t5), model.remove_extra_whitespaces),
            ("has normalizer_spec.precompiled_charsmap", (!of_t5).then_some(false), !model.charsmap.is_empty()),
            ("trainer_spec.byte_fallback", of_t5.then_some(false), model.byte_fallback),
        ];
        for (key, expected, got) in told {
            if let Some(expected) = expected.filter(|&expected| expected != got) {
                return Err(format!(
                    "{key}: expected {expected}, as transformers' conversion of this class has it, got {got}; its ids would not be SentencePiece's: \
                     take a tokenizer.json made for this model"
                ));
            }
        }
        Ok(())
    }

    /// The vocabulary's pieces with their scores.
    ///
    /// # Errors
    /// A Gemma whose first three pieces are not the tokens of their roles.
    pub(super) fn vocabulary<'a>(
        self,
        model: &Model,
        role: impl Fn(&str) -> Option<&'a str>,
        options: &Options,
    ) -> Result<Vec<(String, f64)>, String> {
        let mut vocabulary: Vec<_> = model.pieces.iter().map(|piece| (piece.text.clone(), piece.score)).collect();
        match self {
            Family::Llama => vocabulary.iter_mut().take(3).for_each(|(_, score)| *score = 0.0),
            Family::Gemma => {
                for (id, name) in ["pad_token", "eos_token", "bos_token"].into_iter().enumerate() {
                    let (token, piece) = (role(name), vocabulary.get_mut(id));
                    let Some((_, score)) = piece.filter(|(piece, _)| Some(piece.as_str()) == token) else {
                        let got = model.pieces.get(id).map_or("none", |piece| &piece.text);
                        let token = token.unwrap_or("none");
                        return Err(format!("piece {id}: expected the {name}, {token}, got {got}; {SAVE_ONCE}"));
                    };
                    *score = 0.0;
                }
                if !vocabulary.iter().any(|(piece, _)| piece == "\t")
                    && let Some(tab) = vocabulary.iter_mut().skip(3).find(|(piece, _)| piece == "<0x09>")
                {
                    // The first Gemma had no tab.
                    *tab = ("\t".to_owned(), 0.0);
                }
            }
            Family::T5 => vocabulary.extend((0..options.extra_ids).rev().map(|i| (extra_id(i), 0.0))),
        }
        Ok(vocabulary)
    }

    /// The id that the conversion takes for the unknown piece's in a unigram model.
    pub(super) fn unknown_id(self, model: &Model) -> i64 {
        match self {
            Family::Llama => 0,
            Family::Gemma => 3,
            Family::T5 => model.told_unknown.0,
        }
    }

    /// Whether pieces of bytes stand for characters that the vocabulary lacks.
    pub(super) fn byte_fallback(self) -> bool {
        self != Family::T5
    }

    pub(super) fn normalizer(self, options: &Options, charsmap: &[u8]) -> Result<Value, String> {
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let normalizers = match self {
            Family::Gemma => return Ok(spaces),
            Family::Llama if !options.legacy => return Ok(Value::Null),
            Family::Llama if options.add_prefix_space => vec![json!({"type": "Prepend", "prepend": SPACE}), spaces],
            Family::Llama => vec![spaces],
            Family::T5 => {
                let mut normalizers = Vec::new();
                if !charsmap.is_empty() {
                    let table = Precompiled::from(charsmap).map_err(|error| error.to_string())?;
                    normalizers.push(serde_json::to_value(table).map_err(|error| error.to_string())?);
                }
                normalizers.push(json!({"type": "Strip", "strip_left": false, "strip_right": true}));
                normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}));
                normalizers
            }
        };
        Ok(json!({"type": "Sequence", "normalizers": normalizers}))
    }

    pub(super) fn pre_tokenizer(self, options: &Options) -> Value {
        match self {
            Family::Llama if options.legacy => Value::Null,
            Family::Llama => options.metaspace(false),
            Family::Gemma => {
                json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false})
            }
            Family::T5 => options.metaspace(true),
        }
    }

    pub(super) fn decoder(self, options: &Options) -> Value {
        if self == Family::T5 {
            return options.metaspace(true);
        }
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self == Family::Llama && options.add_prefix_space {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": decoders})
    }
}

/// What `tokenizer_config.json` asks for.
pub(super) struct Options {
    pub(super) add_bos_token: bool,
    pub(super) add_eos_token: bool,
    /// Whether a space goes in front of what follows special tokens, too.
    legacy: bool,
    add_prefix_space: bool,
    /// How many sentinels T5 has behind its pieces.
    pub(super) extra_ids: usize,
}

impl Options {
    /// # Errors
    /// A value of another kind.
    pub(super) fn read(folder: &Path, config: &Map<String, Value>) -> Result<Options, TextError> {
        let wrong = |key: &str, expected: &str, got: &Value| TextError::Load {
            path: folder.join("tokenizer_config.json"),
            reason: format!("{key}: expected {expected}, got {got}"),
        };
        let flag = |key: &str, absent: bool, null: bool| match config.get(key) {
            None => Ok(absent),
            Some(Value::Null) => Ok(null),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong(key, "true or false", other)),
        };
        let extra_ids = match config.get("extra_ids") {
            None => 100,
            Some(value) => {
                let number = value.as_u64().filter(|&number| number <= MAX_EXTRA_IDS);
                number.ok_or_else(|| wrong("extra_ids", &format!("a number up to {MAX_EXTRA_IDS}"), value))? as usize
            }
        };
        Ok(Options {
            add_bos_token: flag("add_bos_token", true, false)?,
            add_eos_token: flag("add_eos_token", false, false)?,
            legacy: flag("legacy", true, true)?,
            add_prefix_space: flag("add_prefix_space", true, false)?,
            extra_ids,
        })
    }

    fn metaspace(&self, split: bool) -> Value {
        let scheme = match (self.add_prefix_space, self.legacy) {
            (false, _) => "never",
            (true, true) => "always",
            (true, false) => "first",
        };
        json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split})
    }
}

/// The name of a sentinel of T5.
pub(super) fn extra_id(i: usize) -> String {
    format!("<extra_id_{i}>")
}
