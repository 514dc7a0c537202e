//! `clip_vision_model`: CLIP's and OpenCLIP's ViTs (B/16, L/14, H/14, bigG/14). A LayerNorm in front of the first block, whose name in
//! the files is `pre_layrnorm`; no bias in the patch convolution; QuickGELU or GELU by `hidden_act`.
//!
//! Follows `CLIPVisionTransformer`, whose `hidden_states[0]` is the output of `pre_layrnorm`.

use serde::Deserialize;
use serde_json::Value;

use super::architecture::{
    Affine, Architecture, BlockParts, EmbeddingParts, MlpParts, NormKind, Positions, Qkv, Resize, Rows, read,
};
use super::mlp::activation;
use crate::activation::Activation;
use crate::config::ConfigError;

/// `CLIPVisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
struct ClipConfig {
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

impl Default for ClipConfig {
    fn default() -> Self {
        ClipConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

/// The block that CLIP and SigLIP share.
pub(super) fn block(activation: Activation) -> BlockParts {
    BlockParts {
        list: "encoder.layers",
        norm1: "layer_norm1",
        qkv: Qkv::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(Affine::biased)),
        output: Affine::biased("self_attn.out_proj"),
        norm2: "layer_norm2",
        mlp: MlpParts::Plain(["mlp.fc1", "mlp.fc2"].map(Affine::biased)),
        activation,
        layer_scale: None,
    }
}

/// Reads the tower's `config.json`, or `vision_config` of a whole CLIP.
pub(super) fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let c: ClipConfig = read(json)?;
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
            patch: Affine { name: "embeddings.patch_embedding", bias: false },
            patch_norm: None,
            class: Some(Rows { name: "embeddings.class_embedding", axes: 1 }),
            registers: None,
            positions: Positions::Table(
                Rows { name: "embeddings.position_embedding.weight", axes: 2 },
                Resize::Bicubic,
            ),
            norm: Some("pre_layrnorm"),
        },
        block: block(activation(&c.hidden_act)?),
    }
    .checked(c.num_channels)
}
