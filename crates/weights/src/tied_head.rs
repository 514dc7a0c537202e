//! A language model's head beside the word embedding that its configuration calls it.

use blip2_torchx::params::TensorSource;
use serde_json::Value;
use tch::Kind;

use crate::directory::PartSource;
use crate::error::WeightsError;
use crate::plans::said_tied_head;

const HEAD: &str = "language_model.lm_head.weight";

/// What families call their word embedding.
const EMBEDDINGS: [&str; 4] = [
    "language_model.model.embed_tokens.weight",
    "language_model.model.decoder.embed_tokens.weight",
    "language_model.transformer.wte.weight",
    "language_model.shared.weight",
];

/// Whether a head that the configuration calls tied is the model's own: `transformers` 5 writes `tie_word_embeddings: true` for every T5, and tells
/// those with a head of their own by `scale_decoder_outputs: false` and other values.
///
/// # Errors
/// Any other head whose values are not the embedding's, since one of the two would go unused.
pub(crate) fn has_own_head(part: &PartSource) -> Result<bool, WeightsError> {
    // Of a family that is not known here nobody can say what it ties; whoever reads its configuration will refuse it.
    if said_tied_head(part.config) != Some(true) {
        return Ok(false);
    }
    let entries = part.weights.entries();
    let has = |wanted: &str| entries.iter().any(|(name, _)| name == wanted);
    let Some(embedding) = EMBEDDINGS.into_iter().find(|name| has(name)).filter(|_| has(HEAD)) else {
        return Ok(false);
    };
    let read = |name: &str| {
        let unreadable =
            |message| WeightsError::Unreadable { origin: part.weights.origin(), name: name.into(), message };
        part.weights.read(name).map_err(unreadable)
    };
    let (head, tied_to) = (read(HEAD)?, read(embedding)?);
    let equal = head.size() == tied_to.size()
        && match head.kind() == tied_to.kind() {
            true => head.equal(&tied_to),
            false => head.to_kind(Kind::Float).equal(&tied_to.to_kind(Kind::Float)),
        };
    let t5 = part.config.get("model_type").and_then(Value::as_str) == Some("t5");
    match equal {
        true => Ok(false),
        false if t5 && part.config.get("scale_decoder_outputs") == Some(&Value::Bool(false)) => Ok(true),
        false => Err(WeightsError::ForeignHead {
            origin: part.weights.origin(),
            name: HEAD.into(),
            tied_to: embedding.into(),
        }),
    }
}
