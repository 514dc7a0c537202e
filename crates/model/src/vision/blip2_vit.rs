//! BLIP-2's own tower (EVA-CLIP ViT-g/14's architecture): pre-norm ViT, exact GELU, one fused qkv projection whose key bias is zero.

use blip2_torchx::params::{Init, Scope};
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::position_embedding;
use crate::config::{ConfigError, check_sizes, parse};
use crate::layers::{LayerNorm, Linear, attend, merge_heads, split_heads};

/// `Blip2VisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[allow(missing_docs)] // Hugging Face's keys
#[serde(default)]
pub struct Blip2VitConfig {
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub image_size: i64,
    pub patch_size: i64,
    pub layer_norm_eps: f64,
    pub qkv_bias: bool,
    pub hidden_act: String,
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

impl Blip2VitConfig {
    /// Reads `vision_config`.
    ///
    /// # Errors
    /// A mistyped key, a size that cannot be, an activation other than GELU.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        const PART: &str = "vision_config";
        let c: Self = parse(PART, json)?;
        check_sizes(
            PART,
            &[
                ("hidden_size", c.hidden_size),
                ("intermediate_size", c.intermediate_size),
                ("num_hidden_layers", c.num_hidden_layers),
                ("num_attention_heads", c.num_attention_heads),
                ("image_size", c.image_size),
                ("patch_size", c.patch_size),
            ],
        )?;
        if c.hidden_size % c.num_attention_heads != 0 {
            return Err(ConfigError::Unsupported {
                part: PART,
                key: "num_attention_heads",
                got: format!("{} for width {}", c.num_attention_heads, c.hidden_size),
                supported: "a divisor of hidden_size",
            });
        }
        if c.hidden_act != "gelu" {
            return Err(ConfigError::Unsupported {
                part: PART,
                key: "hidden_act",
                got: c.hidden_act,
                supported: "gelu",
            });
        }
        Ok(c)
    }
}

/// The tower.
#[derive(Debug)]
pub struct Blip2Vit {
    patch_embedding: (Tensor, Tensor),
    class_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Block>,
    patch_size: i64,
}

#[derive(Debug)]
struct Block {
    layer_norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
}

impl Blip2Vit {
    /// Declares the first `depth` blocks.
    pub fn new(scope: &Scope, c: &Blip2VitConfig, depth: i64) -> Self {
        let e = scope.pp("embeddings");
        let (width, patch) = (c.hidden_size, c.patch_size);
        let patches = (c.image_size / patch).pow(2);
        let conv = e.pp("patch_embedding");
        Blip2Vit {
            patch_embedding: (
                conv.param("weight", &[width, 3, patch, patch], Init::Normal(0.02)),
                conv.param("bias", &[width], Init::Zeros),
            ),
            class_embedding: e.param("class_embedding", &[1, 1, width], Init::Normal(0.02)),
            position_embedding: e.param("position_embedding", &[1, patches + 1, width], Init::Normal(0.02)),
            layers: (0..depth).map(|i| Block::new(&scope.pp("encoder.layers").pp(i), c)).collect(),
            patch_size: patch,
        }
    }

    /// # Shapes
    /// `pixels f32 [B, 3, S, S] -> f32 [B, 1 + (S/patch)^2, width]`.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        let (weight, bias) = &self.patch_embedding;
        let stride = [self.patch_size; 2];
        let patches = pixels.to_kind(weight.kind()).conv2d(weight, Some(bias), stride, [0, 0], [1, 1], 1);
        let grid = patches.size()[2];
        let patches = patches.flatten(2, 3).transpose(1, 2).to_kind(Kind::Float); // [B, grid^2, width]
        let class = self.class_embedding.to_kind(Kind::Float).expand([patches.size()[0], 1, -1], false);
        let mut x = Tensor::cat(&[class, patches], 1) + position_embedding(&self.position_embedding, grid);
        for block in &self.layers {
            x = block.forward(&x);
        }
        x
    }
}

impl Block {
    fn new(scope: &Scope, c: &Blip2VitConfig) -> Block {
        let (width, eps) = (c.hidden_size, c.layer_norm_eps);
        let attn = scope.pp("self_attn");
        Block {
            layer_norm1: LayerNorm::new(&scope.pp("layer_norm1"), width, eps),
            qkv: Linear::plain(&attn.pp("qkv"), width, 3 * width, c.qkv_bias),
            projection: Linear::plain(&attn.pp("projection"), width, width, true),
            layer_norm2: LayerNorm::new(&scope.pp("layer_norm2"), width, eps),
            fc1: Linear::plain(&scope.pp("mlp.fc1"), width, c.intermediate_size, true),
            fc2: Linear::plain(&scope.pp("mlp.fc2"), c.intermediate_size, width, true),
            heads: c.num_attention_heads,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let kind = self.qkv.weight.kind();
        let normed = self.layer_norm1.forward_f32(x).to_kind(kind);
        let qkv = self.qkv.forward(&normed).chunk(3, -1);
        let [q, k, v] = [0, 1, 2].map(|i| split_heads(&qkv[i].contiguous(), self.heads));
        let attended = self.projection.forward(&merge_heads(&attend(&q, &k, &v, None)));
        let x = x + attended.to_kind(Kind::Float);
        let normed = self.layer_norm2.forward_f32(&x).to_kind(kind);
        let mlp = self.fc2.forward(&self.fc1.forward(&normed).gelu("none"));
        x + mlp.to_kind(Kind::Float)
    }
}
