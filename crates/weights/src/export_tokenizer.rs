//! The tokenizer's files in an export, and the token that holds the queries' places in `transformers`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::WeightsError;
use crate::export::TOKENIZER_FILES;
use crate::export_config::{copy_present, write_json};
use crate::json_file::read_object;

/// What `Blip2Processor` calls the token.
const IMAGE_TOKEN: &str = "<image>";
const FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// The id whose places `transformers` fills with the queries: `inherited` from the BLIP-2 model that the language model comes from; else
/// `<image>`, which is the tokenizer's own or the first behind its last token; else, where the vocabulary is full, the last special token
/// that means nothing to the model; else the unknown token of a tokenizer that falls back to bytes, which no text gives. `None` where there is
/// none of these.
///
/// `tokenizer` is the folder of the tokenizer's files.
///
/// # Errors
/// A `tokenizer.json` that cannot be read.
pub fn image_token_index(
    tokenizer: &Path,
    text_config: &Value,
    inherited: Option<i64>,
    vocabulary: i64,
) -> Result<Option<i64>, WeightsError> {
    let json = read_object(&tokenizer.join(FILE))?;
    let tokens = Tokens::of(&json);
    let fits = |id: &i64| (0..vocabulary).contains(id);
    let named = inherited.or_else(|| tokens.id(IMAGE_TOKEN)).unwrap_or_else(|| tokens.next());
    if fits(&named) {
        return Ok(Some(named));
    }
    let unknown = tokens.unknown;
    let ends = ["bos_token_id", "eos_token_id", "decoder_start_token_id"];
    let spoken_for = |id: i64| Some(id) == unknown || has_role(text_config, &["pad_token_id", "unk_token_id"], id);
    let free = |id: &i64| fits(id) && !has_role(text_config, &ends, *id);
    let spare = tokens.special.keys().copied().rfind(|id| free(id) && !spoken_for(*id));
    let falls_back = json["model"]["byte_fallback"] == true;
    Ok(spare.or(unknown.filter(|id| falls_back && free(id))))
}

/// Whether the tokenizer fills batches with the token whose places the queries take, so that a padded batch has too many of them.
///
/// # Errors
/// A file of the tokenizer that cannot be read.
pub fn is_pad_token(tokenizer: &Path, text_config: &Value, id: i64) -> Result<bool, WeightsError> {
    if has_role(text_config, &["pad_token_id"], id) {
        return Ok(true);
    }
    let config = tokenizer.join(CONFIG_FILE);
    let pad = if config.exists() { read_object(&config)?["pad_token"].take() } else { Value::Null };
    let Some(pad) = pad.as_str().or(pad["content"].as_str()) else { return Ok(false) };
    Ok(Tokens::of(&read_object(&tokenizer.join(FILE))?).id(pad) == Some(id))
}

/// Whether the language model's configuration gives an id one of these roles.
fn has_role(text_config: &Value, roles: &[&str], id: i64) -> bool {
    roles.iter().any(|&role| match &text_config[role] {
        Value::Array(ids) => ids.iter().any(|other| other.as_i64() == Some(id)),
        one => one.as_i64() == Some(id),
    })
}

/// How `Blip2Processor` comes to find `<image>` at the id whose places the queries take.
enum ImageTokenName {
    /// It has that id.
    Known,
    /// It adds the next id by itself.
    AddedByProcessor,
    /// It is to be added as the next id.
    Added,
    /// A special token that means nothing to the model is to bear the name.
    InsteadOf(String),
    /// Not at all.
    Nameless,
}

impl ImageTokenName {
    fn of(json: &Value, tokens: &Tokens, index: i64) -> ImageTokenName {
        if let Some(id) = tokens.id(IMAGE_TOKEN) {
            return if id == index { ImageTokenName::Known } else { ImageTokenName::Nameless };
        }
        if let Some(spare) = tokens.special.get(&index).filter(|_| Some(index) != tokens.unknown) {
            // What puts it around texts knows it by its old name; scores would be read and written, which may cost a bit of them.
            return match mentions(&json["post_processor"], spare) || json["model"]["vocab"].is_array() {
                true => ImageTokenName::Nameless,
                false => ImageTokenName::InsteadOf(spare.clone()),
            };
        }
        // Where the ids have gaps, a further token would get another.
        if tokens.next() != index || tokens.ids.len() as i64 != index {
            return ImageTokenName::Nameless;
        }
        // Scores would be read and written, which may cost a bit of them; `Blip2Processor` adds the token by itself.
        if json["model"]["vocab"].is_array() { ImageTokenName::AddedByProcessor } else { ImageTokenName::Added }
    }
}

/// Whether `Blip2Processor` will find `<image>` at this id in an export of the tokenizer, and so put the queries' places before a prompt.
///
/// # Errors
/// A `tokenizer.json` that cannot be read.
pub fn names_image_token(tokenizer: &Path, index: i64) -> Result<bool, WeightsError> {
    let json = read_object(&tokenizer.join(FILE))?;
    Ok(!matches!(ImageTokenName::of(&json, &Tokens::of(&json), index), ImageTokenName::Nameless))
}

/// Whether a text or a key anywhere in `json` is `token`.
fn mentions(json: &Value, token: &str) -> bool {
    match json {
        Value::String(text) => text == token,
        Value::Array(values) => values.iter().any(|value| mentions(value, token)),
        Value::Object(fields) => fields.iter().any(|(key, value)| key == token || mentions(value, token)),
        _ => false,
    }
}

/// Gives a token another name wherever it is the whole of a text or a key.
fn rename(json: &mut Value, from: &str, to: &str) {
    match json {
        Value::String(text) if text == from => *text = to.to_string(),
        Value::Array(values) => values.iter_mut().for_each(|value| rename(value, from, to)),
        Value::Object(fields) => {
            fields.values_mut().for_each(|value| rename(value, from, to));
            if fields.contains_key(from) {
                let renamed = |key: String| if key == from { to.to_string() } else { key };
                *fields = std::mem::take(fields).into_iter().map(|(key, value)| (renamed(key), value)).collect();
            }
        }
        _ => {}
    }
}

/// Copies the tokenizer's files, names the image token where its vocabulary allows it, and writes the `tokenizer_config.json` without which
/// `AutoTokenizer` would take the tokenizer for GPT-2's. Returns whether `Blip2Processor` will find `<image>` at `image_token_index`.
pub(crate) fn write_tokenizer(from: &Path, to: &Path, image_token_index: Option<i64>) -> Result<bool, WeightsError> {
    copy_present(from, to, &TOKENIZER_FILES)?;
    let path = from.join(FILE);
    if !path.exists() {
        if to.join("vocab.txt").exists() && !to.join(CONFIG_FILE).exists() {
            // A BERT of which a vocabulary is all there is.
            write_json(&to.join(CONFIG_FILE), &json!({"tokenizer_class": "BertTokenizer"}))?;
        }
        return Ok(false);
    }
    let mut json = read_object(&path)?;
    let tokens = Tokens::of(&json);
    if !to.join(CONFIG_FILE).exists() {
        write_json(&to.join(CONFIG_FILE), &tokens.config())?;
    }
    let Some(index) = image_token_index else { return Ok(false) };
    match ImageTokenName::of(&json, &tokens, index) {
        ImageTokenName::Nameless => return Ok(false),
        ImageTokenName::Known | ImageTokenName::AddedByProcessor => {}
        ImageTokenName::Added => {
            let token = json!({
                "id": index, "content": IMAGE_TOKEN, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
            });
            match &mut json["added_tokens"] {
                Value::Array(added) => added.push(token),
                absent => *absent = json!([token]),
            }
            write_json(&to.join(FILE), &json)?;
        }
        ImageTokenName::InsteadOf(spare) => {
            rename(&mut json, &spare, IMAGE_TOKEN);
            write_json(&to.join(FILE), &json)?;
            for name in [CONFIG_FILE, "special_tokens_map.json", "added_tokens.json"] {
                let path = to.join(name);
                if path.exists() {
                    let mut file = read_object(&path)?;
                    rename(&mut file, &spare, IMAGE_TOKEN);
                    write_json(&path, &file)?;
                }
            }
        }
    }
    Ok(true)
}

/// The tokens of a `tokenizer.json`.
struct Tokens {
    ids: BTreeMap<String, i64>,
    special: BTreeMap<i64, String>,
    unknown: Option<i64>,
}

impl Tokens {
    fn of(json: &Value) -> Tokens {
        let mut ids: BTreeMap<String, i64> = match &json["model"]["vocab"] {
            Value::Object(vocabulary) => {
                vocabulary.iter().filter_map(|(token, id)| Some((token.clone(), id.as_i64()?))).collect()
            }
            // Unigram: pairs of token and score, in the order of their ids.
            Value::Array(pairs) => {
                (0..).zip(pairs).filter_map(|(id, pair)| Some((pair[0].as_str()?.into(), id))).collect()
            }
            _ => BTreeMap::new(),
        };
        let mut special = BTreeMap::new();
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            if let (Some(id), Some(content)) = (token["id"].as_i64(), token["content"].as_str()) {
                ids.insert(content.into(), id);
                if token["special"] == true {
                    special.insert(id, content.to_string());
                }
            }
        }
        let unknown = match &json["model"]["unk_token"] {
            Value::String(token) => ids.get(token).copied(),
            _ => json["model"]["unk_id"].as_i64(),
        };
        Tokens { ids, special, unknown }
    }

    fn id(&self, token: &str) -> Option<i64> {
        self.ids.get(token).copied()
    }

    /// The first id behind the last token's.
    fn next(&self) -> i64 {
        self.ids.values().max().map_or(0, |last| last + 1)
    }

    /// A class that takes `tokenizer.json` as it is, and the roles of BERT's and the usual models' special tokens. Only what the file itself
    /// calls special gets a role: a class would cut it out of every text.
    fn config(&self) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_input_names": ["input_ids", "attention_mask"],
        });
        let roles: [(&str, &[&str]); 7] = [
            ("bos_token", &["<s>", "<|begin_of_text|>", "<bos>"]),
            ("eos_token", &["</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"]),
            ("unk_token", &["<unk>", "[UNK]"]),
            ("pad_token", &["<pad>", "[PAD]"]),
            ("cls_token", &["[CLS]"]),
            ("sep_token", &["[SEP]"]),
            ("mask_token", &["[MASK]"]),
        ];
        for (role, names) in roles {
            if let Some(name) = names.iter().find(|name| self.special.values().any(|special| special == *name)) {
                config[role] = json!(name);
            }
        }
        config
    }
}
