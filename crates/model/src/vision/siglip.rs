//! `siglip_vision_model`: SigLIP and SigLIP 2 of fixed resolution. No class token; the attention pooling head goes unused.
//!
//! Follows `SiglipVisionTransformer`. SigLIP 2's NaFlex models (`siglip2_vision_model`) take images of any shape as packed patches and
//! are refused.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{Affine, Architecture, EmbeddingParts, NormKind, Positions, Resize, Rows, read};
use super::clip::block;
use super::mlp::activation;
use crate::config::ConfigError;

/// `SiglipVisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct SiglipConfig {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_channels: i64,
    image_size: i64,
    patch_size: i64,
    hidden_act: String,
    layer_norm_eps: f64,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        SiglipConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
        }
    }
}

/// Reads the tower's `config.json`, or `vision_config` of a whole SigLIP.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: SiglipConfig = read(json)?;
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
            class: None,
            registers: None,
            positions: Positions::Table(
                Rows { name: "embeddings.position_embedding.weight", axes: 2 },
                Resize::Bicubic,
            ),
            norm: None,
        },
        block: block(activation(&c.hidden_act)?),
    }
    .checked(c.num_channels)
}
