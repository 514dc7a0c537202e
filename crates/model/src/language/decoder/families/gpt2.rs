//! GPT-2: learned positions, LayerNorm, fused projections stored `[in, out]`.

use super::super::config::{
    AttentionConfig, CaptionFrame, DecoderConfig, EmbeddingScale, LayerConfig, MlpConfig, Names, NormConfig, NormKind,
    NormNames, Positions,
};
use super::super::keys::{Keys, unsupported};
use super::{activation, head_size};
use crate::config::ConfigError;
use crate::dropout::DropoutRates;

const NAMES: Names = Names {
    base: "transformer",
    embeddings: "wte",
    positions: "wpe",
    layers: "h",
    final_norm: "ln_f",
    qkv: &["attn.c_attn"],
    qk_norms: None,
    output: "attn.c_proj",
    attention_norms: NormNames { before: Some("ln_1"), after: None, outer: None },
    mlp_in: &["mlp.c_fc"],
    mlp_out: "mlp.c_proj",
    mlp_norms: NormNames { before: Some("ln_2"), after: None, outer: None },
    input_major: true,
};

/// GPT-2 of any size, and DistilGPT-2.
pub(super) fn gpt2(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    keys.only("add_cross_attention", "false")?;
    let width = keys.size("n_embd", 768)?;
    let vocab_size = keys.size("vocab_size", 50_257)?;
    let heads = keys.size("n_head", 12)?;
    let head_size = head_size(keys, "n_head", width, heads)?;
    if head_size * heads != width {
        return Err(unsupported("head_dim", head_size, "n_embd / n_head"));
    }
    let scaled = keys.flag("scale_attn_weights", true)?;
    let by_depth = keys.flag("scale_attn_by_inverse_layer_idx", false)?;
    let layer = |i: i64| LayerConfig {
        window: None,
        rotary: None,
        scale: if scaled { (head_size as f64).powf(-0.5) } else { 1.0 } / if by_depth { (i + 1) as f64 } else { 1.0 },
    };
    let dropout = DropoutRates {
        embedding: keys.rate("embd_pdrop", 0.1)?,
        attention: keys.rate("attn_pdrop", 0.1)?,
        residual: keys.rate("resid_pdrop", 0.1)?,
    };
    Ok(DecoderConfig {
        vocab_size,
        width,
        embedding_width: width,
        names: NAMES,
        embedding_scale: EmbeddingScale::None,
        positions: Positions::Learned { count: keys.size("n_positions", 1024)?, offset: 0 },
        layers: (0..keys.size("n_layer", 12)?).map(layer).collect(),
        attention: AttentionConfig {
            heads,
            key_value_heads: heads,
            head_size,
            qkv_bias: true,
            output_bias: true,
            logit_cap: None,
        },
        mlp: MlpConfig {
            inner: keys.size("n_inner", 4 * width)?,
            gated: false,
            activation: activation(keys, "activation_function", "gelu_new")?,
            bias: true,
        },
        norm: NormConfig { kind: NormKind::Layer { affine: true }, eps: keys.positive("layer_norm_epsilon", 1e-5)? },
        final_norm: true,
        tied_head: keys.flag("tie_word_embeddings", true)?,
        final_logit_cap: None,
        dropout,
        frame: CaptionFrame::BosFirst,
        bos_token_id: keys.token("bos_token_id", Some(50_256), vocab_size)?,
        eos_token_ids: keys.tokens("eos_token_id", &[50_256], vocab_size)?,
        pad_token_id: keys.pad(None, vocab_size)?,
    })
}
