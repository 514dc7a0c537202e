//! The load plan of each kind of source: what it may lack, and what it may have too much.
//!
//! | store | source | plan |
//! |---|---|---|
//! | vision tower | a tower's directory, a whole BLIP-2 | [`vision_tower`] |
//! | language model | its directory, a whole BLIP-2 | [`language_model`] |
//! | stage 1 | BERT | [`stage1_from_bert`] |
//! | stage 1 | stage-1 checkpoint or export | [`stage1_from_whole`] |
//! | stage 2 | stage-1 checkpoint or export | [`stage2_from_stage1`] |
//! | stage 2 | stage-2 checkpoint or export | [`LoadPlan::exact`] |
//! | either | a checkpoint of LAVIS | that of the stage, through [`from_lavis`] |
//!
//! A plan works on names as [`ModelDir::part`](crate::ModelDir::part) spells them. An export is written without anything unused, so all
//! of its parts also load by [`LoadPlan::exact`].

use blip2_torchx::params::{LoadPlan, TensorSource};
use serde_json::Value;

use crate::error::WeightsError;
use crate::lavis;
use crate::names::{pretraining_head, text_branch};

/// What a source of Q-Former weights holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QFormerSource {
    /// A BERT, as [`Part::QFormer`](crate::Part::QFormer) of its directory names it.
    Bert,
    /// What stage 1 trains.
    Stage1,
    /// What stage 2 trains.
    Stage2,
}

impl QFormerSource {
    /// Tells by the tensors' names; `None` if it is none of these.
    pub fn detect(source: &dyn TensorSource) -> Option<QFormerSource> {
        let entries = source.entries();
        let has = |wanted: &str| entries.iter().any(|(name, _)| name == wanted);
        if has("language_projection.weight") {
            Some(QFormerSource::Stage2)
        } else if has("itm_head.weight") {
            Some(QFormerSource::Stage1)
        } else if has("embeddings.word_embeddings.weight") && has("encoder.layer.0.attention.self.query.weight") {
            Some(QFormerSource::Bert)
        } else {
            None
        }
    }
}

/// A vision tower of `depth` blocks from a tower at least as deep.
///
/// Nothing may be fresh. Unused: blocks from `depth` on; the tower's own final norm, whatever its name (a `post_layernorm` too: ln_vision is
/// trained and comes from elsewhere); pooling heads, classifiers, mask tokens, position id buffers; the text half of an image-text model.
pub fn vision_tower(depth: usize) -> LoadPlan {
    LoadPlan { unused: Box::new(move |name| vision_unused(name, depth)), ..LoadPlan::exact() }
}

/// A language model, `tied` when its head is its word embedding.
///
/// Nothing may be fresh. Unused: buffers that old files carry (RoPE's `inv_freq`, GPT-2's causal masks, OPT's version), a tied head's own copy,
/// and those that T5's encoder and decoder may have of the embedding they share.
pub fn language_model(tied: bool) -> LoadPlan {
    LoadPlan { unused: Box::new(move |name| language_unused(name, tied)), ..LoadPlan::exact() }
}

/// Stage 1 from BERT, as the paper's section 3.4 has it; BERT's token type embeddings go unused, as in LAVIS.
///
/// The FFN of the query rows starts as a copy of the text rows' FFN of the same layer. The word embedding and the head's bias may gain
/// rows (the added `[DEC]`).
/// Fresh: query tokens, cross-attention, the three projections and heads of ITC and ITM, the temperature, ln_vision; the ITG head if the
/// source has none of it. Unused: token type embeddings, position ids, the pooler, next-sentence prediction, and the masked-LM decoder,
/// which must be the word embedding.
///
/// # Errors
/// [`WeightsError::UntiedHead`] if the source's masked-LM decoder differs from its word embedding or its bias from the head's.
pub fn stage1_from_bert(source: &dyn TensorSource) -> Result<LoadPlan, WeightsError> {
    check_tied(source, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight")?;
    check_tied(source, "cls.predictions.decoder.bias", "cls.predictions.bias")?;
    let has_head = source.entries().iter().any(|(name, _)| name.starts_with("cls.predictions."));
    Ok(LoadPlan {
        source_name: Box::new(bert_name),
        fresh: Box::new(move |name| {
            let head = name.starts_with("cls.predictions.");
            (head && !has_head) || (!head && not_in_bert(name))
        }),
        unused: Box::new(|name| {
            ["embeddings.token_type_embeddings.", "pooler.", "cls.seq_relationship.", "cls.predictions.decoder."]
                .iter()
                .any(|module| name.starts_with(module))
                || name == "embeddings.position_ids"
        }),
        gain_rows: Box::new(|name| name == "embeddings.word_embeddings.weight" || name == "cls.predictions.bias"),
    })
}

/// Stage 1 from a whole BLIP-2 of stage 1.
///
/// Fresh: the temperature and the ITG head if the source [`lacks_heads`].
pub fn stage1_from_whole(source: &dyn TensorSource) -> LoadPlan {
    let lacks = lacks_heads(source);
    LoadPlan { fresh: Box::new(move |name| lacks && pretraining_head(name)), ..LoadPlan::exact() }
}

/// Whether a source has nothing of what `transformers` has no names for: a model of its own, or an export that it has saved again.
pub fn lacks_heads(source: &dyn TensorSource) -> bool {
    !source.entries().iter().any(|(name, _)| pretraining_head(name))
}

/// Stage 2 from what stage 1 trained.
///
/// Fresh: `language_projection`. Unused: the text branch (embeddings, text FFNs), the ITG head, the temperature, and the projections and
/// heads of ITC and ITM.
pub fn stage2_from_stage1() -> LoadPlan {
    LoadPlan {
        fresh: Box::new(|name| name.starts_with("language_projection.")),
        unused: Box::new(|name| text_branch(name) || pretraining_head(name) || contrast_or_matching(name)),
        ..LoadPlan::exact()
    }
}

/// A plan for the same source as a checkpoint of LAVIS, which may hold more than the stage needs.
///
/// Unused too: the buffer of position ids, the second names of tied tensors, the frozen towers where they were saved, and the text half and
/// the heads in stage 2.
///
/// # Errors
/// [`WeightsError::UntiedHead`] if the ITG head's decoder differs from the word embedding or its bias from the head's.
pub fn from_lavis(source: &dyn TensorSource, plan: LoadPlan) -> Result<LoadPlan, WeightsError> {
    check_tied(source, "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight")?;
    check_tied(source, "cls.predictions.decoder.bias", "cls.predictions.bias")?;
    let unused = plan.unused;
    let more =
        |name: &str| lavis::dropped(name) || text_branch(name) || pretraining_head(name) || contrast_or_matching(name);
    Ok(LoadPlan { unused: Box::new(move |name| more(name) || unused(name)), ..plan })
}

/// Whether a language model's head is its word embedding, by its configuration or else its family's default in `transformers`.
pub fn tied_head(text_config: &Value) -> bool {
    said_tied_head(text_config).unwrap_or(true)
}

/// The same; `None` where the configuration is silent and its family is not known here.
pub(crate) fn said_tied_head(text_config: &Value) -> Option<bool> {
    let said = text_config.get("tie_word_embeddings").and_then(Value::as_bool);
    said.or_else(|| match text_config.get("model_type")?.as_str()? {
        "llama" | "mistral" | "qwen2" | "qwen3" | "phi3" => Some(false),
        "opt" | "gpt2" | "smollm3" | "gemma" | "gemma2" | "gemma3_text" | "t5" => Some(true),
        _ => None,
    })
}

pub(crate) fn vision_unused(name: &str, depth: usize) -> bool {
    let Some(name) = name.strip_prefix("vision_model.") else {
        let halves = ["text_model.", "visual_projection.", "text_projection."];
        return halves.iter().any(|module| name.starts_with(module)) || ["logit_scale", "logit_bias"].contains(&name);
    };
    let block = ["encoder.layers.", "encoder.layer.", "layer."].iter().find_map(|list| name.strip_prefix(list));
    if let Some((index, _)) = block.and_then(|rest| rest.split_once('.')) {
        return index.parse::<usize>().is_ok_and(|index| index >= depth);
    }
    let modules =
        ["layernorm.", "post_layernorm.", "norm.", "rms_norm.", "pooler.", "head.", "classifier.", "decoder."];
    modules.iter().any(|module| name.starts_with(module))
        || name == "embeddings.mask_token"
        || name == "embeddings.position_ids"
}

pub(crate) fn language_unused(name: &str, tied: bool) -> bool {
    let buffers = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".decoder.version"];
    let stack = ["language_model.encoder.", "language_model.decoder."].iter().find_map(|stem| name.strip_prefix(stem));
    // T5's stacks share one embedding; and its first files have positions for a cross-attention that uses none.
    let t5 = ["embed_tokens.weight", "block.0.layer.1.EncDecAttention.relative_attention_bias.weight"];
    buffers.iter().any(|buffer| name.ends_with(buffer))
        || (tied && name == "language_model.lm_head.weight")
        || stack.is_some_and(|name| t5.contains(&name))
}

fn contrast_or_matching(name: &str) -> bool {
    ["vision_projection.", "text_projection.", "itm_head."].iter().any(|module| name.starts_with(module))
}

/// Where BERT keeps what becomes our parameter.
fn bert_name(ours: &str) -> String {
    if let Some(norm) = ours.strip_prefix("qformer.layernorm.") {
        return format!("embeddings.LayerNorm.{norm}");
    }
    let layer = ours.strip_prefix("qformer.encoder.layer.").and_then(|rest| rest.split_once('.'));
    let Some((index, rest)) = layer else { return ours.to_string() };
    let rest = match rest.split_once('.') {
        Some(("attention", below)) => match below.strip_prefix("attention.") {
            Some(projection) => format!("attention.self.{projection}"),
            None => rest.to_string(),
        },
        Some(("intermediate_query", below)) => format!("intermediate.{below}"),
        Some(("output_query", below)) => format!("output.{below}"),
        _ => rest.to_string(),
    };
    format!("encoder.layer.{index}.{rest}")
}

fn not_in_bert(ours: &str) -> bool {
    ours == "query_tokens"
        || ours == "temp"
        || ours.starts_with("vision_model.post_layernorm.")
        || contrast_or_matching(ours)
        || (ours.starts_with("qformer.encoder.layer.") && ours.contains(".crossattention."))
}

/// Both present and different is an error; a head that leaves its tied tensors out is the common case.
fn check_tied(source: &dyn TensorSource, name: &str, tied_to: &str) -> Result<(), WeightsError> {
    let entries = source.entries();
    let has = |wanted: &str| entries.iter().any(|(name, _)| name == wanted);
    if !has(name) || !has(tied_to) {
        return Ok(());
    }
    let read =
        |name: &str| source.read(name).map_err(|message| WeightsError::Tensor { name: name.to_string(), message });
    let (head, embedding) = (read(name)?, read(tied_to)?);
    if head.size() == embedding.size() && head.kind() == embedding.kind() && head.equal(&embedding) {
        Ok(())
    } else {
        Err(WeightsError::UntiedHead { origin: source.origin(), name: name.into(), tied_to: tied_to.into() })
    }
}
