//! Gemma 1, 2 and 3 (text).

use super::super::config::{DecoderConfig, EmbeddingScale, Names, NormConfig, NormKind, NormNames, Positions};
use super::super::keys::Keys;
use super::super::rope_scaling::{RopeScaling, RotaryConfig};
use super::llama::{Defaults, LLAMA, QK_NORMS, attention_biased, rms_decoder};
use super::windows::{windows, with_windows};
use crate::config::ConfigError;

/// Gemma 2 and 3 have norms on both sides of each sub-layer.
const SANDWICH: Names = Names {
    attention_norms: NormNames {
        before: Some("input_layernorm"),
        after: Some("post_attention_layernorm"),
        outer: None,
    },
    mlp_norms: NormNames {
        before: Some("pre_feedforward_layernorm"),
        after: Some("post_feedforward_layernorm"),
        outer: None,
    },
    ..LLAMA
};

const GEMMA2_DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 26,
    heads: 8,
    key_value_heads: Some(4),
    head_dim: Some(256),
    eps: 1e-6,
    theta: 10_000.0,
    max_positions: 8192,
    phi_rotary: false,
    tied: true,
    bos: Some(2),
    eos: &[1],
    pad: Some(0),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
};

/// Gemma 1: all that comes in is scaled by the root of the width.
pub(super) fn gemma(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    keys.only("use_bidirectional_attention", "false")?;
    let defaults = Defaults {
        hidden_size: 3072,
        intermediate_size: 24_576,
        layers: 28,
        heads: 16,
        key_value_heads: Some(16),
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        ..GEMMA2_DEFAULTS
    };
    let c = attention_biased(keys, one_plus(rms_decoder(keys, &defaults, LLAMA)?))?;
    Ok(DecoderConfig { embedding_scale: EmbeddingScale::Input(root(c.width)), ..c })
}

/// Gemma 2: norms on both sides, a window in every other layer, capped scores and logits.
pub(super) fn gemma2(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    keys.only("use_bidirectional_attention", "false")?;
    let c = attention_biased(keys, one_plus(rms_decoder(keys, &GEMMA2_DEFAULTS, SANDWICH)?))?;
    let window = Some(keys.size("sliding_window", 4096)?);
    let windows = windows(keys, c.layers.len(), window, |i| (i + 1) % 2 != 0)?;
    let mut c = with_scale(keys, with_windows(c, |i| windows[i]))?;
    c.attention.logit_cap = keys.nullable_positive("attn_logit_softcapping", 50.0)?;
    c.final_logit_cap = keys.nullable_positive("final_logit_softcapping", 30.0)?;
    Ok(DecoderConfig { embedding_scale: EmbeddingScale::Input(root(c.width)), ..c })
}

/// Gemma 3: norms of queries and keys instead of capped scores; five layers with a window and frequencies of their own, then one without.
pub(super) fn gemma3(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    keys.only("use_bidirectional_attention", "false")?;
    // Its class reads this key and never uses it.
    keys.only("attn_logit_softcapping", "null")?;
    let defaults = Defaults { vocab_size: 262_208, theta: 1_000_000.0, max_positions: 131_072, ..GEMMA2_DEFAULTS };
    let names = Names { qk_norms: QK_NORMS, ..SANDWICH };
    let c = attention_biased(keys, one_plus(rms_decoder(keys, &defaults, names)?))?;
    let window = Some(keys.size("sliding_window", 4096)?);
    let pattern = keys.size("sliding_window_pattern", 6)? as usize;
    let windows = windows(keys, c.layers.len(), window, |i| (i + 1) % pattern != 0)?;
    let mut c = with_scale(keys, with_windows(c, |i| windows[i]))?;
    let local = RotaryConfig {
        size: c.attention.head_size,
        theta: keys.positive("rope_local_base_freq", 10_000.0)?,
        scaling: RopeScaling::None,
    };
    if let Positions::Rotary(tables) = &mut c.positions {
        tables.push(local);
    }
    for layer in &mut c.layers {
        layer.rotary = Some(usize::from(layer.window.is_some()));
    }
    c.final_logit_cap = keys.optional_positive("final_logit_softcapping")?;
    Ok(DecoderConfig { embedding_scale: EmbeddingScale::Lookup(root(c.width)), ..c })
}

fn one_plus(c: DecoderConfig) -> DecoderConfig {
    DecoderConfig { norm: NormConfig { kind: NormKind::RmsOnePlus, ..c.norm }, ..c }
}

fn root(width: i64) -> f64 {
    (width as f64).sqrt()
}

/// Scores are scaled by `query_pre_attn_scalar`, whatever the width of a head.
fn with_scale(keys: &Keys, mut c: DecoderConfig) -> Result<DecoderConfig, ConfigError> {
    let scale = keys.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5);
    for layer in &mut c.layers {
        layer.scale = scale;
    }
    Ok(c)
}
