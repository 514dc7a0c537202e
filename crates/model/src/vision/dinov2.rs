//! `dinov2` and `dinov2_with_registers`: LayerScale, and SwiGLU in the giant.
//!
//! Follows `Dinov2Model` and `Dinov2WithRegistersModel`.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, PART, Positions, Qkv, Resize, Rows, read,
};
use super::mlp::activation;
use crate::activation::Activation;
use crate::config::ConfigError;

/// What `Dinov2Config` and `Dinov2WithRegistersConfig` share.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct Dinov2Config {
    hidden_size: i64,
    mlp_ratio: f64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_channels: i64,
    image_size: i64,
    patch_size: Option<i64>,
    layer_norm_eps: f64,
    qkv_bias: bool,
    hidden_act: String,
    use_swiglu_ffn: bool,
    num_register_tokens: i64,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Dinov2Config {
            hidden_size: 768,
            mlp_ratio: 4.0,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: None,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            hidden_act: "gelu".into(),
            use_swiglu_ffn: false,
            num_register_tokens: 4,
        }
    }
}

/// Reads a `dinov2`.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    build(read(json)?, 14, Resize::Bicubic, false)
}

/// Reads a `dinov2_with_registers`.
pub(super) fn architecture_with_registers(json: &Value) -> Result<Architecture, ConfigError> {
    build(read(json)?, 16, Resize::BicubicAntialiased, true)
}

/// `patch`: the class' default size of a patch.
fn build(c: Dinov2Config, patch: i64, resize: Resize, registers: bool) -> Result<Architecture, ConfigError> {
    if !(0.0..=1024.0).contains(&c.mlp_ratio) {
        return Err(ConfigError::Unsupported {
            part: PART,
            key: "mlp_ratio",
            got: c.mlp_ratio.to_string(),
            supported: "a positive number up to 1024",
        });
    }
    let inner = (c.hidden_size as f64 * c.mlp_ratio) as i64;
    // Two thirds, so that three matrices cost what two do, rounded up to a multiple of 8.
    let swiglu_inner = ((inner as f64 * 2.0 / 3.0) as i64 + 7) / 8 * 8;
    Architecture {
        width: c.hidden_size,
        inner: if c.use_swiglu_ffn { swiglu_inner } else { inner },
        heads: c.num_attention_heads,
        blocks: c.num_hidden_layers,
        image_size: c.image_size,
        patch_size: c.patch_size.unwrap_or(patch),
        norm: NormKind::Layer,
        eps: c.layer_norm_eps,
        embeddings: EmbeddingParts {
            patch: Affine::biased("embeddings.patch_embeddings.projection"),
            patch_norm: None,
            class: Some(Rows { name: "embeddings.cls_token", axes: 3 }),
            registers: registers
                .then_some((Rows { name: "embeddings.register_tokens", axes: 3 }, c.num_register_tokens)),
            positions: Positions::Table(Rows { name: "embeddings.position_embeddings", axes: 3 }, resize),
            norm: None,
        },
        block: BlockParts {
            list: "encoder.layer",
            norm1: "norm1",
            qkv: Qkv::Separate(
                ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
                    .map(|name| Affine { name, bias: c.qkv_bias }),
            ),
            output: Affine::biased("attention.output.dense"),
            norm2: "norm2",
            mlp: if c.use_swiglu_ffn {
                MlpParts::PackedGated(["mlp.weights_in", "mlp.weights_out"].map(Affine::biased))
            } else {
                MlpParts::Plain(["mlp.fc1", "mlp.fc2"].map(Affine::biased))
            },
            activation: if c.use_swiglu_ffn { Activation::Silu } else { activation(&c.hidden_act)? },
            layer_scale: Some(["layer_scale1.lambda1", "layer_scale2.lambda1"]),
        },
    }
    .checked(c.num_channels)
}
