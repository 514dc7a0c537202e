//! `dinov3_vit`: rotary positions instead of a table, register tokens, LayerScale, a plain or a gated MLP.
//!
//! Follows `DINOv3ViTModel`; what it does to coordinates in training (`pos_embed_shift`, `_jitter`, `_rescale`) is not for a frozen tower.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, Positions, Qkv, Rows, read,
};
use super::mlp::activation;
use crate::config::ConfigError;

/// `DINOv3ViTConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct Dinov3Config {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_channels: i64,
    image_size: i64,
    patch_size: i64,
    hidden_act: String,
    layer_norm_eps: f64,
    rope_theta: f64,
    query_bias: bool,
    key_bias: bool,
    value_bias: bool,
    proj_bias: bool,
    mlp_bias: bool,
    use_gated_mlp: bool,
    num_register_tokens: i64,
}

impl Default for Dinov3Config {
    fn default() -> Self {
        Dinov3Config {
            hidden_size: 384,
            intermediate_size: 1536,
            num_hidden_layers: 12,
            num_attention_heads: 6,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-5,
            rope_theta: 100.0,
            query_bias: true,
            key_bias: false,
            value_bias: true,
            proj_bias: true,
            mlp_bias: true,
            use_gated_mlp: false,
            num_register_tokens: 0,
        }
    }
}

/// Reads the tower's `config.json`.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: Dinov3Config = read(json)?;
    let mlp = |name| Affine { name, bias: c.mlp_bias };
    Architecture {
        width: c.hidden_size,
        inner: c.intermediate_size,
        heads: c.num_attention_heads,
        blocks: c.num_hidden_layers,
        image_size: c.image_size,
        patch_size: c.patch_size,
        norm: NormKind::Layer,
        eps: c.layer_norm_eps,
        embeddings: EmbeddingParts {
            patch: Affine::biased("embeddings.patch_embeddings"),
            patch_norm: None,
            class: Some(Rows { name: "embeddings.cls_token", axes: 3 }),
            registers: Some((Rows { name: "embeddings.register_tokens", axes: 3 }, c.num_register_tokens)),
            positions: Positions::Rotary { theta: c.rope_theta },
            norm: None,
        },
        block: BlockParts {
            list: "layer",
            norm1: "norm1",
            qkv: Qkv::Separate([
                Affine { name: "attention.q_proj", bias: c.query_bias },
                Affine { name: "attention.k_proj", bias: c.key_bias },
                Affine { name: "attention.v_proj", bias: c.value_bias },
            ]),
            output: Affine { name: "attention.o_proj", bias: c.proj_bias },
            norm2: "norm2",
            mlp: if c.use_gated_mlp {
                MlpParts::Gated(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map(mlp))
            } else {
                MlpParts::Plain(["mlp.up_proj", "mlp.down_proj"].map(mlp))
            },
            activation: activation(&c.hidden_act)?,
            layer_scale: Some(["layer_scale1.lambda1", "layer_scale2.lambda1"]),
        },
    }
    .checked(c.num_channels)
}
