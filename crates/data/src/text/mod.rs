//! Captions: BLIP's cleaning, and a Hugging Face tokenizer that truncates as `transformers` does.

pub(crate) mod caption;
pub(crate) mod gpt2_files;
pub(crate) mod question;
pub(crate) mod sentencepiece;
pub(crate) mod tokenizer_folder;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokenizers::{AddedToken, Decoder, Tokenizer, TruncationParams};

use crate::shards::scan::LFS_POINTER;
use crate::text::tokenizer_folder::{converted_tokenizer, tokenizer_json};

/// Words of a caption that are kept.
const MAX_WORDS: usize = 50;

/// Why a tokenizer cannot be used.
#[derive(Debug, Error)]
pub enum TextError {
    /// The tokenizer's file cannot be read or parsed.
    #[error("tokenizer {}: {reason}", .path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Too few tokens to hold a word beside the special ones.
    #[error("max_tokens is {max_tokens}, but the tokenizer {} adds {special} special tokens of its own; allow more", .path.display())]
    MaxTokens {
        /// The tokenizer's file.
        path: PathBuf,
        /// What was asked for.
        max_tokens: usize,
        /// Special tokens around a text.
        special: usize,
    },
    /// A text cannot be tokenised.
    #[error("the tokenizer refused \"{text}\": {reason}")]
    Encode {
        /// The text.
        text: String,
        /// What the tokenizer said.
        reason: String,
    },
}

/// How captions are cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clean {
    /// BLIP's `blip_caption`: lower case, few punctuation marks, at most 50 words.
    Blip,
    /// Surrounding white space is removed; case and marks stay.
    None,
}

impl Clean {
    /// Every choice.
    pub const ALL: [Clean; 2] = [Clean::Blip, Clean::None];

    /// The word for it in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Clean::Blip => "blip",
            Clean::None => "none",
        }
    }
}

/// Whether anything is left of a caption when it is cleaned.
pub(crate) fn says_something(caption: &str, clean: Clean) -> bool {
    !clean_caption(caption, clean).is_empty()
}

/// A caption as the model gets it; empty when nothing is left.
pub fn clean_caption(caption: &str, clean: Clean) -> String {
    match clean {
        Clean::None => caption.trim().to_owned(),
        Clean::Blip => {
            let lower = caption.to_lowercase();
            let spaced = lower.replace(['.', '!', '"', '(', ')', '*', '#', ':', ';', '~'], " ");
            let collapsed = collapse_white_space(&spaced);
            let words = collapsed.trim_end_matches('\n').trim_matches(' ');
            words.split(' ').take(MAX_WORDS).collect::<Vec<_>>().join(" ")
        }
    }
}

/// Two or more white-space characters in a row become one space; a single one stays what it is.
fn collapse_white_space(text: &str) -> String {
    let mut collapsed = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let mut run = 1;
        while is_white_space(character) && characters.next_if(|next| is_white_space(*next)).is_some() {
            run += 1;
        }
        collapsed.push(if run > 1 { ' ' } else { character });
    }
    collapsed
}

/// Python's idea of white space, which holds four separators more than Unicode's.
fn is_white_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// Turns text into token ids and back. Padding is the collation's business: what the tokenizer's file says of it, and
/// of truncation, is switched off.
#[derive(Clone)]
pub struct TextEncoder {
    /// Where it comes from, for messages.
    path: PathBuf,
    tokenizer: Tokenizer,
    add_special_tokens: bool,
    /// What stands in front of every text.
    lead: String,
    /// Tokens beside the model's, by id.
    added: HashMap<u32, AddedToken>,
}

impl TextEncoder {
    /// The tokenizer of a `tokenizer.json`, or of GPT-2's files or a SentencePiece model beside where it would be, giving at most `max_tokens` ids a text,
    /// special tokens included when `add_special_tokens`.
    ///
    /// # Errors
    /// When the file cannot be read or parsed, or `max_tokens` leaves no room beside the special tokens.
    pub fn from_file(
        path: impl AsRef<Path>,
        max_tokens: usize,
        add_special_tokens: bool,
    ) -> Result<TextEncoder, TextError> {
        let path = path.as_ref();
        let folder = path.parent().unwrap_or(Path::new("."));
        let converted = if path.exists() { None } else { converted_tokenizer(folder)? };
        let read =
            || fs::read(path).map_err(|error| TextError::Load { path: path.to_owned(), reason: error.to_string() });
        let file = converted.map_or_else(read, Ok)?;
        TextEncoder::from_bytes(&file, path, max_tokens, add_special_tokens)
    }

    /// The tokenizer of a folder: its `tokenizer.json`, GPT-2's `vocab.json` and `merges.txt`, a SentencePiece model, or a BERT's `vocab.txt` with the options of
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`TextEncoder::from_file`]; neither file; a vocabulary without the special tokens that the files name.
    pub fn from_folder(folder: &Path, max_tokens: usize, add_special_tokens: bool) -> Result<TextEncoder, TextError> {
        let file = tokenizer_json(folder)?;
        TextEncoder::from_bytes(&file, &folder.join("tokenizer.json"), max_tokens, add_special_tokens)
    }

    pub(crate) fn from_bytes(
        file: &[u8],
        path: &Path,
        max_tokens: usize,
        add_special_tokens: bool,
    ) -> Result<TextEncoder, TextError> {
        let load = |reason: String| TextError::Load { path: path.to_owned(), reason };
        if file.starts_with(LFS_POINTER) {
            return Err(load("it is a Git LFS pointer, not the file; run `git lfs pull`".to_owned()));
        }
        let text = std::str::from_utf8(file).map_err(|error| load(format!("not UTF-8: {error}")))?;
        // Not `Tokenizer::from_bytes`, a generic function that compiles the reading of every kind of tokenizer once more, here.
        let mut tokenizer: Tokenizer = text.parse().map_err(|error| load(one_line(&error)))?;
        tokenizer.with_padding(None);
        let added = tokenizer.get_added_tokens_decoder().into_iter().collect();
        TextEncoder { path: path.to_owned(), tokenizer, add_special_tokens, lead: String::new(), added }
            .of_length(max_tokens)
    }

    /// The same tokenizer, giving at most `max_tokens` ids a text.
    ///
    /// # Errors
    /// When `max_tokens` leaves no room beside the special tokens.
    pub fn of_length(mut self, max_tokens: usize) -> Result<TextEncoder, TextError> {
        let path = &self.path;
        let load = |error| TextError::Load { path: path.clone(), reason: one_line(&error) };
        self.tokenizer.with_truncation(None).map_err(load)?;
        // The library subtracts this from the length without a check, whether it adds them or not.
        let special = self.tokenizer.encode("", true).map_err(load)?.len();
        if max_tokens <= special {
            return Err(TextError::MaxTokens { path: path.clone(), max_tokens, special });
        }
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        self.tokenizer.with_truncation(Some(truncation)).map_err(load)?;
        Ok(self)
    }

    /// The same tokenizer with `lead` in front of every text, both tokenised as one.
    pub fn led_by(self, lead: String) -> TextEncoder {
        TextEncoder { lead, ..self }
    }

    /// The text's ids, the text cut so that a closing special token stays last.
    ///
    /// # Errors
    /// When the tokenizer's model cannot tokenise the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let encoding = match self.lead.as_str() {
            "" => self.tokenizer.encode_fast(text, self.add_special_tokens),
            lead => self.tokenizer.encode_fast([lead, text].concat(), self.add_special_tokens),
        };
        let encoding =
            encoding.map_err(|error| TextError::Encode { text: text.to_owned(), reason: one_line(&error) })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text that ids stand for, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        // The library's own way gives an added token its normalised name (Llama's `</s>` a space in front), and then does not know it for special.
        let name = |id: &u32| match self.added.get(id) {
            Some(token) => Some(token.content.clone()).filter(|_| !token.special),
            None => self.tokenizer.id_to_token(*id),
        };
        let tokens: Vec<String> = ids.iter().filter_map(name).collect();
        match self.tokenizer.get_decoder() {
            None => Ok(tokens.join(" ")),
            Some(decoder) => decoder
                .decode(tokens)
                .map_err(|error| TextError::Encode { text: format!("{ids:?}"), reason: one_line(&error) }),
        }
    }

    /// The id of a token, as `[SEP]`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The tokenizer for a model of `vocabulary` tokens: special tokens beyond it, which stand for other things than text (images in Gemma 3),
    /// are spelled out where a text has their names. `None` where other tokens lie beyond it.
    pub fn within(mut self, vocabulary: usize) -> Option<TextEncoder> {
        if self.vocab_size() > vocabulary {
            let beyond = |id: u32| id as usize >= vocabulary;
            let special = |id: &u32| self.added.get(id).is_some_and(|token| token.special);
            if !self.tokenizer.get_vocab(true).into_values().filter(|&id| beyond(id)).all(|id| special(&id)) {
                return None;
            }
            self.tokenizer.set_encode_special_tokens(true);
        }
        Some(self)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}

fn one_line(error: &impl ToString) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word-level tokenizer with BERT's special tokens, whose file asks for padding and truncation of its own.
    const TOKENIZER: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [
            {"id": 0, "content": "[PAD]", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 2, "content": "[CLS]", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 3, "content": "[SEP]", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "red": 5, "apple": 6}, "unk_token": "[UNK]"}
    }"#;

    fn encoder(max_tokens: usize, add_special_tokens: bool) -> Result<TextEncoder, TextError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, TOKENIZER).unwrap();
        TextEncoder::from_file(path, max_tokens, add_special_tokens)
    }

    #[test]
    fn cleans_as_blip_caption_does() {
        // What the regular expressions of LAVIS' BlipCaptionProcessor give in Python.
        for (raw, expected) in [
            ("A Dog.", "a dog"),
            ("  Two   cats (and \"one\" dog)!\n", "two cats and one dog"),
            ("it's well-known, isn't it?", "it's well-known, isn't it?"),
            ("a#b:c;d~e*f", "a b c d e f"),
            ("one\ttab", "one\ttab"),
            ("two\t\ttabs", "two tabs"),
            ("CAF\u{c9} \u{130}", "caf\u{e9} i\u{307}"),
            ("...", ""),
            ("", ""),
        ] {
            assert_eq!(clean_caption(raw, Clean::Blip), expected, "{raw:?}");
        }
        let long = vec!["word"; 60].join(" ");
        assert_eq!(clean_caption(&long, Clean::Blip).split(' ').count(), 50);
    }

    #[test]
    fn no_cleaning_keeps_case_and_marks() {
        assert_eq!(clean_caption(" Ein Hund: \u{201e}Wau!\u{201c}\n", Clean::None), "Ein Hund: \u{201e}Wau!\u{201c}");
    }

    #[test]
    fn the_files_own_padding_and_truncation_are_off() {
        let text = encoder(32, true).unwrap();
        assert_eq!(text.encode("a red apple a red apple").unwrap(), [2, 4, 5, 6, 4, 5, 6, 3]);
        assert_eq!(text.encode("").unwrap(), [2, 3]);
    }

    #[test]
    fn the_closing_token_stays_last_when_the_text_is_cut() {
        assert_eq!(encoder(4, true).unwrap().encode("a red apple").unwrap(), [2, 4, 5, 3]);
        assert_eq!(encoder(3, false).unwrap().encode("a red apple red").unwrap(), [4, 5, 6]);
    }

    #[test]
    fn a_lead_is_cut_and_framed_with_the_text_behind_it() {
        let text = encoder(5, true).unwrap().led_by("a red ".into());
        assert_eq!(text.encode("apple").unwrap(), [2, 4, 5, 6, 3]);
        assert_eq!(text.encode("apple a").unwrap(), [2, 4, 5, 6, 3]);
        assert_eq!(text.encode("s").unwrap(), [2, 4, 5, 1, 3], "a word of its own");
    }

    #[test]
    fn ids_become_text_without_special_tokens() {
        let text = encoder(8, true).unwrap();
        assert_eq!(text.decode(&[2, 4, 5, 6, 3, 0, 0]).unwrap(), "a red apple");
        assert_eq!((text.token_id("[SEP]"), text.token_id("[DEC]"), text.vocab_size()), (Some(3), None, 7));
    }

    #[test]
    fn no_room_beside_the_special_tokens_is_refused() {
        let error = encoder(2, true).err().unwrap();
        assert!(matches!(error, TextError::MaxTokens { max_tokens: 2, special: 2, .. }), "{error}");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, "version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert!(TextEncoder::from_file(&path, 8, true).err().unwrap().to_string().contains("git lfs pull"));
        fs::write(&path, "{").unwrap();
        assert!(matches!(TextEncoder::from_file(&path, 8, true), Err(TextError::Load { .. })));
    }
}
