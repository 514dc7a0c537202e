//! DINOv2: pre-norm ViT with LayerScale, separate query, key and value projections, exact GELU.

use blip2_torchx::params::{Init, Scope};
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::position_embedding;
use crate::config::{ConfigError, check_sizes, parse};
use crate::layers::{LayerNorm, Linear, attend, merge_heads, split_heads};

/// `Dinov2Config`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[allow(missing_docs)] // Hugging Face's keys
#[serde(default)]
pub struct Dinov2Config {
    pub hidden_size: i64,
    pub mlp_ratio: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub image_size: i64,
    pub patch_size: i64,
    pub layer_norm_eps: f64,
    pub qkv_bias: bool,
    pub hidden_act: String,
    pub use_swiglu_ffn: bool,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Dinov2Config {
            hidden_size: 768,
            mlp_ratio: 4,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 14,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            hidden_act: "gelu".into(),
            use_swiglu_ffn: false,
        }
    }
}

impl Dinov2Config {
    /// Reads the tower's `config.json`.
    ///
    /// # Errors
    /// A mistyped key, a size that cannot be, the giant model's SwiGLU.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        const PART: &str = "vision_config";
        let c: Self = parse(PART, json)?;
        check_sizes(
            PART,
            &[
                ("hidden_size", c.hidden_size),
                ("mlp_ratio", c.mlp_ratio),
                ("num_hidden_layers", c.num_hidden_layers),
                ("num_attention_heads", c.num_attention_heads),
                ("image_size", c.image_size),
                ("patch_size", c.patch_size),
            ],
        )?;
        let unsupported = |key, got, supported| Err(ConfigError::Unsupported { part: PART, key, got, supported });
        if c.hidden_size % c.num_attention_heads != 0 {
            let got = format!("{} for width {}", c.num_attention_heads, c.hidden_size);
            return unsupported("num_attention_heads", got, "a divisor of hidden_size");
        }
        if c.use_swiglu_ffn {
            return unsupported("use_swiglu_ffn", "true".into(), "false");
        }
        if c.hidden_act != "gelu" {
            return unsupported("hidden_act", c.hidden_act, "gelu");
        }
        Ok(c)
    }
}

/// The tower.
#[derive(Debug)]
pub struct Dinov2 {
    projection: (Tensor, Tensor),
    cls_token: Tensor,
    position_embeddings: Tensor,
    layer: Vec<Block>,
    patch_size: i64,
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    layer_scale1: Tensor,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    layer_scale2: Tensor,
    heads: i64,
}

impl Dinov2 {
    /// Declares the first `depth` blocks.
    pub fn new(scope: &Scope, c: &Dinov2Config, depth: i64) -> Self {
        let e = scope.pp("embeddings");
        let (width, patch) = (c.hidden_size, c.patch_size);
        let patches = (c.image_size / patch).pow(2);
        let conv = e.pp("patch_embeddings.projection");
        Dinov2 {
            projection: (
                conv.param("weight", &[width, 3, patch, patch], Init::Normal(0.02)),
                conv.param("bias", &[width], Init::Zeros),
            ),
            cls_token: e.param("cls_token", &[1, 1, width], Init::Normal(0.02)),
            position_embeddings: e.param("position_embeddings", &[1, patches + 1, width], Init::Normal(0.02)),
            layer: (0..depth).map(|i| Block::new(&scope.pp("encoder.layer").pp(i), c)).collect(),
            patch_size: patch,
        }
    }

    /// # Shapes
    /// `pixels f32 [B, 3, S, S] -> f32 [B, 1 + (S/patch)^2, width]`.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        let (weight, bias) = &self.projection;
        let stride = [self.patch_size; 2];
        let patches = pixels.to_kind(weight.kind()).conv2d(weight, Some(bias), stride, [0, 0], [1, 1], 1);
        let grid = patches.size()[2];
        let patches = patches.flatten(2, 3).transpose(1, 2).to_kind(Kind::Float); // [B, grid^2, width]
        let class = self.cls_token.to_kind(Kind::Float).expand([patches.size()[0], 1, -1], false);
        let mut x = Tensor::cat(&[class, patches], 1) + position_embedding(&self.position_embeddings, grid);
        for block in &self.layer {
            x = block.forward(&x);
        }
        x
    }
}

impl Block {
    fn new(scope: &Scope, c: &Dinov2Config) -> Block {
        let (width, eps) = (c.hidden_size, c.layer_norm_eps);
        let attention = scope.pp("attention.attention");
        let inner = width * c.mlp_ratio;
        Block {
            norm1: LayerNorm::new(&scope.pp("norm1"), width, eps),
            query: Linear::plain(&attention.pp("query"), width, width, c.qkv_bias),
            key: Linear::plain(&attention.pp("key"), width, width, c.qkv_bias),
            value: Linear::plain(&attention.pp("value"), width, width, c.qkv_bias),
            dense: Linear::plain(&scope.pp("attention.output.dense"), width, width, true),
            layer_scale1: scope.pp("layer_scale1").param("lambda1", &[width], Init::Ones),
            norm2: LayerNorm::new(&scope.pp("norm2"), width, eps),
            fc1: Linear::plain(&scope.pp("mlp.fc1"), width, inner, true),
            fc2: Linear::plain(&scope.pp("mlp.fc2"), inner, width, true),
            layer_scale2: scope.pp("layer_scale2").param("lambda1", &[width], Init::Ones),
            heads: c.num_attention_heads,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let kind = self.query.weight.kind();
        let normed = self.norm1.forward_f32(x).to_kind(kind);
        let [q, k, v] = [&self.query, &self.key, &self.value].map(|l| split_heads(&l.forward(&normed), self.heads));
        let attended = self.dense.forward(&merge_heads(&attend(&q, &k, &v, None)));
        let x = x + attended.to_kind(Kind::Float) * self.layer_scale1.to_kind(Kind::Float);
        let normed = self.norm2.forward_f32(&x).to_kind(kind);
        let mlp = self.fc2.forward(&self.fc1.forward(&normed).gelu("none"));
        x + mlp.to_kind(Kind::Float) * self.layer_scale2.to_kind(Kind::Float)
    }
}
