//! `blip_2_vision_model`: BLIP-2's own tower, EVA-CLIP ViT-g/14's architecture. One fused qkv projection whose key bias is zero.
//!
//! Follows `Blip2VisionModel`.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, Positions, Qkv, Resize, Rows, read,
};
use super::mlp::activation;
use crate::config::ConfigError;

/// `Blip2VisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct Blip2VitConfig {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    image_size: i64,
    patch_size: i64,
    layer_norm_eps: f64,
    qkv_bias: bool,
    hidden_act: String,
}

impl Default for Blip2VitConfig {
    /// ViT-g/14 without its last block, as the paper uses it.
    fn default() -> Self {
        Blip2VitConfig {
            hidden_size: 1408,
            intermediate_size: 6144,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 14,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            hidden_act: "gelu".into(),
        }
    }
}

/// Reads `vision_config`.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: Blip2VitConfig = read(json)?;
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
            patch: Affine::biased("embeddings.patch_embedding"),
            patch_norm: None,
            class: Some(Rows { name: "embeddings.class_embedding", axes: 3 }),
            registers: None,
            positions: Positions::Table(Rows { name: "embeddings.position_embedding", axes: 3 }, Resize::Bicubic),
            norm: None,
        },
        block: BlockParts {
            list: "encoder.layers",
            norm1: "layer_norm1",
            qkv: Qkv::Fused(Affine { name: "self_attn.qkv", bias: c.qkv_bias }),
            output: Affine::biased("self_attn.projection"),
            norm2: "layer_norm2",
            mlp: MlpParts::Plain([Affine::biased("mlp.fc1"), Affine::biased("mlp.fc2")]),
            activation: activation(&c.hidden_act)?,
            layer_scale: None,
        },
    }
    .checked(3)
}
