//! `vit`: the plain vision transformer.
//!
//! Follows `ViTModel`.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, Positions, Qkv, Resize, Rows, read,
};
use super::mlp::activation;
use crate::config::ConfigError;

/// `ViTConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct VitConfig {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_channels: i64,
    image_size: i64,
    patch_size: i64,
    hidden_act: String,
    layer_norm_eps: f64,
    qkv_bias: bool,
}

impl Default for VitConfig {
    fn default() -> Self {
        VitConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            qkv_bias: true,
        }
    }
}

/// Reads the tower's `config.json`.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: VitConfig = read(json)?;
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
            patch: Affine::biased("embeddings.patch_embeddings.projection"),
            patch_norm: None,
            class: Some(Rows { name: "embeddings.cls_token", axes: 3 }),
            registers: None,
            positions: Positions::Table(Rows { name: "embeddings.position_embeddings", axes: 3 }, Resize::Bicubic),
            norm: None,
        },
        block: BlockParts {
            list: "encoder.layer",
            norm1: "layernorm_before",
            qkv: Qkv::Separate(
                ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
                    .map(|name| Affine { name, bias: c.qkv_bias }),
            ),
            output: Affine::biased("attention.output.dense"),
            norm2: "layernorm_after",
            mlp: MlpParts::Plain(["intermediate.dense", "output.dense"].map(Affine::biased)),
            activation: activation(&c.hidden_act)?,
            layer_scale: None,
        },
    }
    .checked(c.num_channels)
}
