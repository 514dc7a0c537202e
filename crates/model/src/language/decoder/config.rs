//! What a decoder is made of: the parts that a family and its configuration choose.

use std::borrow::Cow;

use serde_json::Value;

use super::families;
use super::rope_parameters::with_older_keys;
use super::rope_scaling::RotaryConfig;
use crate::activation::Activation;
use crate::config::ConfigError;
use crate::dropout::DropoutRates;

/// A decoder-only language model as a choice of parts. [`DecoderConfig::from_json`] makes it from a `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Tokens in the embedding table.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub width: i64,
    /// Width of the embeddings; other than `width` in OPT-350M, which projects them in and out.
    pub embedding_width: i64,
    /// Hugging Face's names of the parameters, and with them which norms and projections there are.
    pub names: Names,
    /// What embeddings are multiplied by, and where.
    pub embedding_scale: EmbeddingScale,
    /// How positions enter.
    pub positions: Positions,
    /// What differs from layer to layer, first to last.
    pub layers: Vec<LayerConfig>,
    /// Sizes of the attention.
    pub attention: AttentionConfig,
    /// The feed-forward network.
    pub mlp: MlpConfig,
    /// Every norm.
    pub norm: NormConfig,
    /// Whether a norm stands behind the last layer.
    pub final_norm: bool,
    /// Whether the head is the embedding table.
    pub tied_head: bool,
    /// Logits are `cap tanh(logits / cap)`.
    pub final_logit_cap: Option<f64>,
    /// Rates of dropout that the model was trained with.
    pub dropout: DropoutRates,
    /// What stands around a caption.
    pub frame: CaptionFrame,
    /// Its first token, where it has one.
    pub bos_token_id: Option<i64>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<i64>,
    /// The token that fills batches, where it has one.
    pub pad_token_id: Option<i64>,
}

/// What stands around the queries and a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptionFrame {
    /// BOS, queries, prompt, caption, EOS: decoders lean on their first token.
    BosFirst,
    /// Queries, BOS (`</s>`), prompt, caption, `"\n"`: the order in which LAVIS trained with OPT.
    Opt,
}

/// Where embeddings are scaled. The queries of BLIP-2 are not looked up, so it matters to them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EmbeddingScale {
    /// Nowhere.
    None,
    /// At the look-up: tokens alone (Gemma 3).
    Lookup(f64),
    /// Behind it: all that comes in, queries too (Gemma 1 and 2).
    Input(f64),
}

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Queries and keys are rotated; a layer picks one of these tables.
    Rotary(Vec<RotaryConfig>),
    /// A table of `count + offset` rows is added to the embeddings; position p reads row `p + offset`.
    Learned {
        /// Positions there are.
        count: i64,
        /// Rows in front of them (2 in OPT).
        offset: i64,
    },
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// A row sees itself and the rows before it, this many together; all of them where `None`.
    pub window: Option<i64>,
    /// Which of the rotary tables turns queries and keys.
    pub rotary: Option<usize>,
    /// Multiplies products of queries and keys.
    pub scale: f64,
}

/// Sizes of the attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Heads of the queries.
    pub heads: i64,
    /// Heads of keys and values, a divisor of `heads`.
    pub key_value_heads: i64,
    /// Width of a head.
    pub head_size: i64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub output_bias: bool,
    /// Scores are `cap tanh(scores / cap)`.
    pub logit_cap: Option<f64>,
}

/// The feed-forward network. It is gated where its names list a gate beside the projection up, or the two are fused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlpConfig {
    /// Width inside.
    pub inner: i64,
    /// `activation(gate) * up` instead of `activation(up)`.
    pub gated: bool,
    /// The activation.
    pub activation: Activation,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// Every norm of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormConfig {
    /// Its formula.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f64,
}

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Layer normalisation with scale and shift, or with neither.
    Layer {
        /// Whether it has scale and shift.
        affine: bool,
    },
    /// Root mean square, statistics in f32, scaled in the dtype of its input.
    Rms,
    /// Root mean square, scaled by `1 + weight` in f32 (Gemma).
    RmsOnePlus,
}

/// Hugging Face's names below `language_model.`; what has no name is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// The base model.
    pub base: &'static str,
    /// Its embedding table.
    pub embeddings: &'static str,
    /// Its table of learned positions.
    pub positions: &'static str,
    /// Its list of layers.
    pub layers: &'static str,
    /// The norm behind them.
    pub final_norm: &'static str,
    /// In a layer: queries, keys and values; one name where they are fused.
    pub qkv: &'static [&'static str],
    /// Norms of each head's queries and keys.
    pub qk_norms: Option<[&'static str; 2]>,
    /// The projection behind the attention.
    pub output: &'static str,
    /// Norms around the attention.
    pub attention_norms: NormNames,
    /// Into the feed-forward network: gate and up, or one name where they are fused or there is no gate.
    pub mlp_in: &'static [&'static str],
    /// Out of it.
    pub mlp_out: &'static str,
    /// Norms around it.
    pub mlp_norms: NormNames,
    /// Weights of projections are stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    pub input_major: bool,
}

/// The norms around a sub-layer `f`: `outer(x + after(f(before(x))))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NormNames {
    /// In front of the sub-layer.
    pub before: Option<&'static str>,
    /// Behind it, before the residual is added.
    pub after: Option<&'static str>,
    /// Behind the sum.
    pub outer: Option<&'static str>,
}

impl DecoderConfig {
    /// Every `model_type` that is known, for messages.
    pub const KNOWN: &'static str = families::KNOWN;

    /// Reads `text_config` or the model's `config.json`; `None` where its `model_type` is no known decoder's.
    ///
    /// Absent keys have the defaults of `transformers`, which leaves these out of the files it writes.
    ///
    /// # Errors
    /// A mistyped key, a size that cannot be, a value that no code of ours computes; each by its key.
    pub fn from_json(json: &Value) -> Option<Result<DecoderConfig, ConfigError>> {
        families::read(json.get("model_type")?.as_str()?, json)
    }

    /// The same configuration with the keys that `transformers` 4 knows: version 5's `rope_parameters` become the older ones.
    ///
    /// # Errors
    /// Values that have no counterpart there, or contradict older keys beside them.
    pub fn with_older_keys(json: &Value) -> Result<Value, ConfigError> {
        with_older_keys(json).map(Cow::into_owned)
    }

    /// Width of what goes in and comes out: of its embeddings.
    pub fn hidden_size(&self) -> i64 {
        self.embedding_width
    }

    /// The longest sequence that its positions allow, where they end; rotary ones do not.
    pub fn max_positions(&self) -> Option<i64> {
        match self.positions {
            Positions::Learned { count, .. } => Some(count),
            Positions::Rotary(_) => None,
        }
    }
}
