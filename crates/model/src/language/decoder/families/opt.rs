//! OPT: learned positions, LayerNorm, ReLU.

use super::super::config::{
    AttentionConfig, CaptionFrame, DecoderConfig, EmbeddingScale, LayerConfig, MlpConfig, Names, NormConfig, NormKind,
    NormNames, Positions,
};
use super::super::keys::{Keys, unsupported};
use super::{activation, head_size};
use crate::config::ConfigError;
use crate::dropout::DropoutRates;

const PRE_NORM: Names = Names {
    base: "model.decoder",
    embeddings: "embed_tokens",
    positions: "embed_positions",
    layers: "layers",
    final_norm: "final_layer_norm",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norms: None,
    output: "self_attn.out_proj",
    attention_norms: NormNames { before: Some("self_attn_layer_norm"), after: None, outer: None },
    mlp_in: &["fc1"],
    mlp_out: "fc2",
    mlp_norms: NormNames { before: Some("final_layer_norm"), after: None, outer: None },
    input_major: false,
};

/// OPT-350M's norms stand behind the residual sums.
const POST_NORM: Names = Names {
    attention_norms: NormNames { before: None, after: None, outer: Some("self_attn_layer_norm") },
    mlp_norms: NormNames { before: None, after: None, outer: Some("final_layer_norm") },
    ..PRE_NORM
};

/// OPT 125M to 66B, and Galactica, which is one without biases.
pub(super) fn opt(keys: &Keys) -> Result<DecoderConfig, ConfigError> {
    let width = keys.size("hidden_size", 768)?;
    let vocab_size = keys.size("vocab_size", 50_272)?;
    let heads = keys.size("num_attention_heads", 12)?;
    let head_size = head_size(keys, "num_attention_heads", width, heads)?;
    if head_size * heads != width {
        return Err(unsupported("head_dim", head_size, "hidden_size / num_attention_heads"));
    }
    let layer = LayerConfig { window: None, rotary: None, scale: (head_size as f64).powf(-0.5) };
    let pre_norm = keys.flag("do_layer_norm_before", true)?;
    let bias = keys.flag("enable_bias", true)?;
    let layerdrop = keys.rate("layerdrop", 0.0)?;
    if layerdrop > 0.0 {
        return Err(unsupported("layerdrop", layerdrop, "0: a frozen model drops no layers"));
    }
    let residual = keys.rate("dropout", 0.1)?;
    Ok(DecoderConfig {
        vocab_size,
        width,
        embedding_width: keys.size("word_embed_proj_dim", width)?,
        names: if pre_norm { PRE_NORM } else { POST_NORM },
        embedding_scale: EmbeddingScale::None,
        positions: Positions::Learned { count: keys.size("max_position_embeddings", 2048)?, offset: 2 },
        layers: vec![layer; keys.size("num_hidden_layers", 12)? as usize],
        attention: AttentionConfig {
            heads,
            key_value_heads: heads,
            head_size,
            qkv_bias: bias,
            output_bias: bias,
            logit_cap: None,
        },
        mlp: MlpConfig {
            inner: keys.size("ffn_dim", 3072)?,
            gated: false,
            activation: activation(keys, "activation_function", "relu")?,
            bias,
        },
        norm: NormConfig {
            kind: NormKind::Layer { affine: keys.flag("layer_norm_elementwise_affine", true)? },
            eps: 1e-5,
        },
        final_norm: pre_norm && !keys.flag("_remove_final_layer_norm", false)?,
        tied_head: keys.flag("tie_word_embeddings", true)?,
        final_logit_cap: None,
        dropout: DropoutRates { embedding: 0.0, attention: keys.rate("attention_dropout", 0.0)?, residual },
        frame: CaptionFrame::Opt,
        bos_token_id: keys.token("bos_token_id", Some(2), vocab_size)?,
        eos_token_ids: keys.tokens("eos_token_id", &[2], vocab_size)?,
        pad_token_id: keys.pad(Some(1), vocab_size)?,
    })
}
