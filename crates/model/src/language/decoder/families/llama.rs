//! Llama and its descendants: Vicuna and SmolLM (`llama` themselves), Mistral, Qwen2, Qwen3, SmolLM3, Phi-3.

use super::super::config::{
    AttentionConfig, CaptionFrame, DecoderConfig, EmbeddingScale, LayerConfig, MlpConfig, Names, NormConfig, NormKind,
    NormNames, Positions,
};
use super::super::keys::{Keys, invalid, unsupported};
use super::super::rope_scaling::{RopeScaling, RotaryConfig};
use super::windows::{windows, with_windows};
use super::{activation, head_size};
use crate::config::ConfigError;
use crate::dropout::DropoutRates;

/// The names of Llama's parameters.
pub(super) const LLAMA: Names = Names {
    base: "model",
    embeddings: "embed_tokens",
    positions: "",
    layers: "layers",
    final_norm: "norm",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norms: None,
    output: "self_attn.o_proj",
    attention_norms: NormNames { before: Some("input_layernorm"), after: None, outer: None },
    mlp_in: &["mlp.gate_proj", "mlp.up_proj"],
    mlp_out: "mlp.down_proj",
    mlp_norms: NormNames { before: Some("post_attention_layernorm"), after: None, outer: None },
    input_major: false,
};

/// Norms of each head's queries and keys, where a family has them.
pub(super) const QK_NORMS: Option<[&str; 2]> = Some(["self_attn.q_norm", "self_attn.k_norm"]);

const PHI3: Names = Names { qkv: &["self_attn.qkv_proj"], mlp_in: &["mlp.gate_up_proj"], ..LLAMA };

/// What a file of the family means where it has no such key.
pub(super) struct Defaults {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub layers: i64,
    pub heads: i64,
    /// As many as `heads` where `None`.
    pub key_value_heads: Option<i64>,
    /// The width of a head; `None`: the heads share `hidden_size`.
    pub head_dim: Option<i64>,
    pub eps: f64,
    pub theta: f64,
    pub max_positions: i64,
    /// Phi-3's files may turn a part of each head (`partial_rotary_factor`), and say `su` or `yarn` where they mean LongRoPE.
    pub phi_rotary: bool,
    pub tied: bool,
    pub bos: Option<i64>,
    pub eos: &'static [i64],
    pub pad: Option<i64>,
    /// The activation's key and value.
    pub activation: (&'static str, &'static str),
}

const LLAMA_DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    layers: 32,
    heads: 32,
    key_value_heads: None,
    head_dim: None,
    eps: 1e-6,
    theta: 10_000.0,
    max_positions: 2048,
    phi_rotary: false,
    tied: false,
    bos: Some(1),
    eos: &[2],
    pad: None,
    activation: ("hidden_act", "silu"),
};

const QWEN_DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    key_value_heads: Some(32),
    max_positions: 32_768,
    bos: None,
    eos: &[],
    ..LLAMA_DEFAULTS
};

/// Llama 1 to 3, Vicuna, SmolLM.
pub(super) fn llama(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    biased(keys, rms_decoder(keys, &LLAMA_DEFAULTS, LLAMA)?)
}

/// Mistral: every layer slides.
pub(super) fn mistral(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let defaults =
        Defaults { intermediate_size: 14_336, key_value_heads: Some(8), max_positions: 4096 * 32, ..LLAMA_DEFAULTS };
    let c = unbiased(keys, rms_decoder(keys, &defaults, LLAMA)?)?;
    let window = keys.nullable_size("sliding_window", Some(4096))?;
    // Its own class knows no layer_types.
    Ok(with_windows(c, |_| window))
}

/// Qwen2 and 2.5: biases of queries, keys and values.
pub(super) fn qwen2(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let c = rms_decoder(keys, &QWEN_DEFAULTS, LLAMA)?;
    let c = DecoderConfig { attention: AttentionConfig { qkv_bias: true, ..c.attention }, ..c };
    qwen_windows(keys, c)
}

/// Qwen3: norms of each head's queries and keys.
pub(super) fn qwen3(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let names = Names { qk_norms: QK_NORMS, ..LLAMA };
    let c = rms_decoder(keys, &Defaults { head_dim: Some(128), ..QWEN_DEFAULTS }, names)?;
    qwen_windows(keys, attention_biased(keys, c)?)
}

/// SmolLM3: every fourth layer turns nothing, and knows positions by the causal mask alone.
pub(super) fn smollm3(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let defaults = Defaults {
        vocab_size: 128_256,
        hidden_size: 2048,
        layers: 36,
        heads: 16,
        key_value_heads: Some(4),
        theta: 2_000_000.0,
        max_positions: 32_768,
        tied: true,
        bos: Some(128_000),
        eos: &[128_001],
        pad: Some(128_004),
        ..LLAMA_DEFAULTS
    };
    let c = biased(keys, rms_decoder(keys, &defaults, LLAMA)?)?;
    let interval = keys.size("no_rope_layer_interval", 4)? as usize;
    let turned: Vec<bool> = match keys.value("no_rope_layers") {
        None => (0..c.layers.len()).map(|i| (i + 1) % interval != 0).collect(),
        Some(list) => {
            let flags: Option<Vec<bool>> =
                list.as_array().and_then(|flags| flags.iter().map(|flag| Some(flag.as_i64()? != 0)).collect());
            let flags = flags.ok_or_else(|| invalid("no_rope_layers", "a list of 0 and 1", list))?;
            if flags.len() != c.layers.len() {
                return Err(unsupported("no_rope_layers", format!("{} entries", flags.len()), "one a layer"));
            }
            flags
        }
    };
    let window = match keys.flag("use_sliding_window", false)? {
        true => keys.optional_size("sliding_window")?,
        false => None,
    };
    let windows = windows(keys, c.layers.len(), window, |i| !turned[i])?;
    let mut c = with_windows(c, |i| windows[i]);
    for (layer, turned) in c.layers.iter_mut().zip(turned) {
        layer.rotary = layer.rotary.filter(|_| turned);
    }
    Ok(c)
}

/// Phi-3 and Phi-4-mini: fused projections, LongRoPE, part of a head turned.
pub(super) fn phi3(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let defaults = Defaults {
        vocab_size: 32_064,
        hidden_size: 3072,
        intermediate_size: 8192,
        eps: 1e-5,
        max_positions: 4096,
        phi_rotary: true,
        eos: &[32_000],
        pad: Some(32_000),
        ..LLAMA_DEFAULTS
    };
    let c = unbiased(keys, rms_decoder(keys, &defaults, PHI3)?)?;
    if let Positions::Rotary(tables) = &c.positions {
        let plain = |scaling: &RopeScaling| matches!(scaling, RopeScaling::None | RopeScaling::LongRope { .. });
        if !tables.iter().all(|table| plain(&table.scaling)) {
            let got = keys.value("rope_scaling").map(ToString::to_string).unwrap_or_default();
            return Err(unsupported("rope_scaling", got, "null or longrope"));
        }
    }
    let window = keys.nullable_size("sliding_window", None)?;
    let residual = keys.rate("resid_pdrop", 0.0)?;
    let dropout = DropoutRates { residual, ..c.dropout };
    Ok(with_windows(DecoderConfig { dropout, ..c }, |_| window))
}

/// A Llama without biases and windows; what differs in a family is changed from here.
pub(super) fn rms_decoder(keys: &Keys, d: &Defaults, names: Names) -> Result<DecoderConfig, ConfigError> {
    let width = keys.size("hidden_size", d.hidden_size)?;
    let vocab_size = keys.size("vocab_size", d.vocab_size)?;
    let heads = keys.size("num_attention_heads", d.heads)?;
    let key_value_heads = keys.nullable_size("num_key_value_heads", d.key_value_heads)?.unwrap_or(heads);
    if heads % key_value_heads != 0 {
        return Err(unsupported("num_key_value_heads", key_value_heads, "a divisor of num_attention_heads"));
    }
    let head_size = match d.head_dim.filter(|_| keys.value("head_dim").is_none()) {
        Some(size) => size,
        None => head_size(keys, "num_attention_heads", width, heads)?,
    };
    let table = rotary(keys, d, head_size)?;
    let layer = LayerConfig { window: None, rotary: Some(0), scale: (head_size as f64).powf(-0.5) };
    let (key, default) = d.activation;
    Ok(DecoderConfig {
        vocab_size,
        width,
        embedding_width: width,
        names,
        embedding_scale: EmbeddingScale::None,
        positions: Positions::Rotary(vec![table]),
        layers: vec![layer; keys.size("num_hidden_layers", d.layers)? as usize],
        attention: AttentionConfig {
            heads,
            key_value_heads,
            head_size,
            qkv_bias: false,
            output_bias: false,
            logit_cap: None,
        },
        mlp: MlpConfig {
            inner: keys.size("intermediate_size", d.intermediate_size)?,
            gated: true,
            activation: activation(keys, key, default)?,
            bias: false,
        },
        norm: NormConfig { kind: NormKind::Rms, eps: keys.positive("rms_norm_eps", d.eps)? },
        final_norm: true,
        tied_head: keys.flag("tie_word_embeddings", d.tied)?,
        final_logit_cap: None,
        dropout: DropoutRates { attention: keys.rate("attention_dropout", 0.0)?, ..DropoutRates::default() },
        frame: CaptionFrame::BosFirst,
        bos_token_id: keys.token("bos_token_id", d.bos, vocab_size)?,
        eos_token_ids: keys.tokens("eos_token_id", d.eos, vocab_size)?,
        pad_token_id: keys.pad(d.pad, vocab_size)?,
    })
}

/// The rotary table that `rope_theta` and `rope_scaling` describe.
fn rotary(keys: &Keys, d: &Defaults, head_size: i64) -> Result<RotaryConfig, ConfigError> {
    let share = keys.positive("partial_rotary_factor", 1.0)?;
    if share > 1.0 || (share != 1.0 && !d.phi_rotary) {
        return Err(unsupported("partial_rotary_factor", share, if d.phi_rotary { "above 0, at most 1" } else { "1" }));
    }
    let max_positions = keys.size("max_position_embeddings", d.max_positions)?;
    let size = (head_size as f64 * share) as i64;
    RotaryConfig::read(keys, size, keys.positive("rope_theta", d.theta)?, max_positions, d.phi_rotary)
}

/// A family whose `attention_bias` and `mlp_bias` mean what they say.
fn biased(keys: &Keys, c: DecoderConfig) -> Result<DecoderConfig, ConfigError> {
    let bias = keys.flag("mlp_bias", false)?;
    attention_biased(keys, DecoderConfig { mlp: MlpConfig { bias, ..c.mlp }, ..c })
}

/// A family whose `attention_bias` means what it says.
pub(super) fn attention_biased(keys: &Keys, c: DecoderConfig) -> Result<DecoderConfig, ConfigError> {
    let bias = keys.flag("attention_bias", false)?;
    Ok(DecoderConfig { attention: AttentionConfig { qkv_bias: bias, output_bias: bias, ..c.attention }, ..c })
}

/// A family that knows no biases.
fn unbiased(keys: &Keys, c: DecoderConfig) -> Result<DecoderConfig, ConfigError> {
    keys.only("attention_bias", "false")?;
    keys.only("mlp_bias", "false")?;
    Ok(c)
}

/// Qwen's windows: in the layers from `max_window_layers` on, where they are switched on at all.
fn qwen_windows(keys: &Keys, c: DecoderConfig) -> Result<DecoderConfig, ConfigError> {
    let window = match keys.flag("use_sliding_window", false)? {
        true => keys.nullable_size("sliding_window", Some(4096))?,
        false => None,
    };
    let first = keys.count("max_window_layers", 28)?;
    let windows = windows(keys, c.layers.len(), window, |i| i as i64 >= first)?;
    Ok(with_windows(c, |i| windows[i]))
}
