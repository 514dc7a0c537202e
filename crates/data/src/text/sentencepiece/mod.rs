//! SentencePiece models: what directories of Llama, Vicuna, Mistral, Gemma and T5 may have instead of a `tokenizer.json`, and what `transformers` 4.57
//! converts them to.

mod added_tokens;
mod bpe;
mod charsmap;
mod family;
mod model_file;

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::text::TextError;
use crate::text::tokenizer_folder::read_object;
use added_tokens::Named;
use family::{Family, Options, SAVE_ONCE};
use model_file::{Algorithm, Model};

const FILES: [&str; 2] = ["tokenizer.model", "spiece.model"];

/// Whether a folder has such a model.
pub(crate) fn present(folder: &Path) -> bool {
    FILES.iter().any(|name| folder.join(name).is_file())
}

/// The `tokenizer.json` that says the same as the model and the configuration beside it.
///
/// # Errors
/// Another class of tokenizers, files that cannot be read, are damaged or do not fit each other.
pub(crate) fn tokenizer_json(folder: &Path) -> Result<Value, TextError> {
    let config = read_object(folder, "tokenizer_config.json")?;
    let family = Family::of(folder, &config)?;
    let options = Options::read(folder, &config)?;
    let model = Model::read(&folder.join(family.file()))?;
    let named = Named::read(folder, &config, family, &options)?;

    let refused = |reason: String| TextError::Load { path: model.path.clone(), reason };
    family.check(&model, &options).map_err(refused)?;
    let vocabulary = family.vocabulary(&model, |role| named.role(role), &options).map_err(refused)?;
    let ids: HashMap<&str, usize> = vocabulary.iter().map(|(piece, _)| piece.as_str()).zip(0..).collect();
    if ids.len() < vocabulary.len() {
        return Err(refused(format!(
            "expected no piece named as one of {} extra_ids, got one; {SAVE_ONCE}",
            options.extra_ids
        )));
    }
    let added = named.all(&ids, &model.pieces, family)?;
    let id = |token: &str| added.id(token).or(ids.get(token).map(|&id| id as u32));
    let post_processor = post_processor(family, &options, &named, id).map_err(refused)?;
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.json(),
        "normalizer": family.normalizer(&options, &model.charsmap).map_err(refused)?,
        "pre_tokenizer": family.pre_tokenizer(&options),
        "post_processor": post_processor,
        "decoder": family.decoder(&options),
        "model": model_json(family, &model, &vocabulary).map_err(refused)?,
    }))
}

/// The algorithm's part.
fn model_json(family: Family, model: &Model, vocabulary: &[(String, f64)]) -> Result<Value, String> {
    match model.algorithm {
        Algorithm::Unigram => {
            let unknown = family.unknown_id(model);
            if unknown != model.unknown as i64 {
                return Err(format!(
                    "expected the unknown piece at id {unknown}, got it at {}; {SAVE_ONCE}",
                    model.unknown
                ));
            }
            Ok(
                json!({"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": family.byte_fallback()}),
            )
        }
        Algorithm::Bpe => {
            let (unknown, told_unknown) = (&model.pieces[model.unknown].text, &model.told_unknown.1);
            if unknown != told_unknown {
                return Err(format!(
                    "trainer_spec.unk_piece: expected {unknown}, got {told_unknown}; fetch the file again"
                ));
            }
            // Merges may consist of pieces under the names that the model has for them.
            let mut own_ids: HashMap<&str, usize> =
                model.pieces.iter().map(|piece| piece.text.as_str()).zip(0..).collect();
            if let (Family::Gemma, Some(&tab)) = (family, own_ids.get("<0x09>")) {
                own_ids.entry("\t").or_insert(tab);
            }
            let merges = bpe::merges(&own_ids, vocabulary);
            let ids: Map<String, Value> =
                vocabulary.iter().map(|(piece, _)| piece.clone()).zip((0..).map(Value::from)).collect();
            Ok(json!({
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": family.byte_fallback(), "ignore_merges": false, "vocab": ids, "merges": merges,
            }))
        }
    }
}

/// What goes around a text, or two: BOS and EOS as the options say, or T5's end.
fn post_processor(
    family: Family,
    options: &Options,
    named: &Named,
    id: impl Fn(&str) -> Option<u32>,
) -> Result<Value, String> {
    let wanted = |flag: bool, role: &str| match named.role(role) {
        None if flag => Err(format!("tokenizer_config.json: add_{role}: expected a {role}, got none")),
        token => Ok(token.filter(|_| flag)),
    };
    let (before, after, second) = match family {
        // Whatever its `eos_token`.
        Family::T5 => (None, Some("</s>"), 0),
        _ => (wanted(options.add_bos_token, "bos_token")?, wanted(options.add_eos_token, "eos_token")?, 1),
    };
    let part = |sequence: &str, type_id: i32| {
        let special = |token: Option<&str>| token.map(|id| json!({"SpecialToken": {"id": id, "type_id": type_id}}));
        let text = Some(json!({"Sequence": {"id": sequence, "type_id": type_id}}));
        [special(before), text, special(after)].into_iter().flatten().collect::<Vec<_>>()
    };
    let mut special = Map::new();
    for token in [before, after].into_iter().flatten() {
        let id = id(token).ok_or_else(|| format!("expected the piece {token}, got none; {SAVE_ONCE}"))?;
        special.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let pair = [part("A", 0), part("B", second)].concat();
    Ok(json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": special}))
}
