//! `aimv2_vision_model`: RMSNorm throughout, one of them behind the patch convolution; a gated MLP; no class token.
//!
//! Follows `Aimv2VisionModel`, which does not interpolate its table of positions. Native-resolution models (`is_native`) have none and
//! take any size.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, Positions, Qkv, Resize, Rows, read,
};
use super::mlp::activation;
use crate::config::ConfigError;

/// `Aimv2VisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct Aimv2Config {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_channels: i64,
    image_size: i64,
    patch_size: i64,
    rms_norm_eps: f64,
    qkv_bias: bool,
    mlp_bias: bool,
    hidden_act: String,
    is_native: bool,
}

impl Default for Aimv2Config {
    fn default() -> Self {
        Aimv2Config {
            hidden_size: 1024,
            intermediate_size: 2816,
            num_hidden_layers: 24,
            num_attention_heads: 8,
            num_channels: 3,
            image_size: 224,
            patch_size: 14,
            rms_norm_eps: 1e-5,
            qkv_bias: false,
            mlp_bias: false,
            hidden_act: "silu".into(),
            is_native: false,
        }
    }
}

/// Reads the tower's `config.json`, or `vision_config` of a whole AIMv2.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: Aimv2Config = read(json)?;
    let attention = |name| Affine { name, bias: c.qkv_bias };
    let table = Rows { name: "embeddings.position_embedding.weight", axes: 2 };
    Architecture {
        width: c.hidden_size,
        inner: c.intermediate_size,
        heads: c.num_attention_heads,
        blocks: c.num_hidden_layers,
        image_size: c.image_size,
        patch_size: c.patch_size,
        norm: NormKind::Rms,
        eps: c.rms_norm_eps,
        embeddings: EmbeddingParts {
            patch: Affine::biased("embeddings.patch_embed"),
            patch_norm: Some("embeddings.rms_norm"),
            class: None,
            registers: None,
            positions: if c.is_native { Positions::SinCos } else { Positions::Table(table, Resize::Fixed) },
            norm: None,
        },
        block: BlockParts {
            list: "encoder.layers",
            norm1: "rms_norm1",
            qkv: Qkv::Separate(["attention.q_proj", "attention.k_proj", "attention.v_proj"].map(attention)),
            output: attention("attention.out_proj"),
            norm2: "rms_norm2",
            mlp: MlpParts::Gated(
                ["ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"].map(|name| Affine { name, bias: c.mlp_bias }),
            ),
            activation: activation(&c.hidden_act)?,
            layer_scale: None,
        },
    }
    .checked(c.num_channels)
}
