//! Frozen image encoders.
//!
//! A tower returns `hidden_states[layer]` of `transformers` (0 = embeddings) without the final norm; blocks behind that layer are not
//! built. The residual stream is fp32, matrix products run in the storage dtype.

pub mod blip2_vit;
pub mod dinov2;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::ConfigError;
pub use blip2_vit::{Blip2Vit, Blip2VitConfig};
pub use dinov2::{Dinov2, Dinov2Config};

/// CLIP's channel means, which BLIP-2's towers expect.
pub const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// CLIP's channel standard deviations.
pub const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// ImageNet's channel means.
pub const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// ImageNet's channel standard deviations.
pub const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

/// A tower's configuration, by `model_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum VisionConfig {
    /// `blip_2_vision_model`: EVA-CLIP ViT-g's architecture.
    Blip2Vit(Blip2VitConfig),
    /// `dinov2`.
    Dinov2(Dinov2Config),
}

impl VisionConfig {
    /// Reads a tower's `config.json` (or `vision_config`).
    ///
    /// # Errors
    /// An unknown `model_type`, a missing key, a size that cannot be.
    pub fn from_json(json: &Value) -> Result<VisionConfig, ConfigError> {
        match json.get("model_type").and_then(Value::as_str) {
            Some("blip_2_vision_model") | None => Blip2VitConfig::from_json(json).map(VisionConfig::Blip2Vit),
            Some("dinov2") => Dinov2Config::from_json(json).map(VisionConfig::Dinov2),
            Some(other) => Err(ConfigError::Unsupported {
                part: "vision_config",
                key: "model_type",
                got: other.into(),
                supported: "blip_2_vision_model, dinov2",
            }),
        }
    }

    /// Width of the features.
    pub fn hidden_size(&self) -> i64 {
        match self {
            VisionConfig::Blip2Vit(c) => c.hidden_size,
            VisionConfig::Dinov2(c) => c.hidden_size,
        }
    }

    /// Blocks of the whole tower.
    pub fn num_hidden_layers(&self) -> i64 {
        match self {
            VisionConfig::Blip2Vit(c) => c.num_hidden_layers,
            VisionConfig::Dinov2(c) => c.num_hidden_layers,
        }
    }

    /// The epsilon of its norms; `post_layernorm` takes it too, as `transformers` does (LAVIS: 1e-5).
    pub fn layer_norm_eps(&self) -> f64 {
        match self {
            VisionConfig::Blip2Vit(c) => c.layer_norm_eps,
            VisionConfig::Dinov2(c) => c.layer_norm_eps,
        }
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> i64 {
        match self {
            VisionConfig::Blip2Vit(c) => c.patch_size,
            VisionConfig::Dinov2(c) => c.patch_size,
        }
    }

    /// The input size that its position embedding was trained for.
    pub fn image_size(&self) -> i64 {
        match self {
            VisionConfig::Blip2Vit(c) => c.image_size,
            VisionConfig::Dinov2(c) => c.image_size,
        }
    }

    /// Feature tokens of a square image of `size` pixels: patches and the class token.
    pub fn tokens(&self, size: i64) -> i64 {
        (size / self.patch_size()).pow(2) + 1
    }

    /// `hidden_states[layer]`'s depth: `layer` as `transformers` counts (negative from the end); `None` is -1 for BLIP-2's tower, -2 for
    /// others, whose last layer serves another purpose.
    ///
    /// # Errors
    /// A layer that the tower does not have.
    pub fn depth(&self, layer: Option<i64>) -> Result<i64, ConfigError> {
        let layers = self.num_hidden_layers();
        let layer = layer.unwrap_or(if matches!(self, VisionConfig::Blip2Vit(_)) { -1 } else { -2 });
        let depth = if layer < 0 { layers + 1 + layer } else { layer };
        if (0..=layers).contains(&depth) {
            return Ok(depth);
        }
        Err(ConfigError::Unsupported {
            part: "vision_config",
            key: "layer",
            got: format!("{layer} of a tower with {layers} blocks"),
            supported: "-(blocks + 1) to blocks",
        })
    }

    /// The channel means and standard deviations the tower was trained with.
    pub fn normalisation(&self) -> ([f64; 3], [f64; 3]) {
        match self {
            VisionConfig::Blip2Vit(_) => (CLIP_MEAN, CLIP_STD),
            VisionConfig::Dinov2(_) => (IMAGENET_MEAN, IMAGENET_STD),
        }
    }

    /// Builds the first `depth` blocks below `scope`.
    pub fn build(&self, scope: &Scope, depth: i64) -> VisionTower {
        match self {
            VisionConfig::Blip2Vit(c) => VisionTower::Blip2Vit(Blip2Vit::new(scope, c, depth)),
            VisionConfig::Dinov2(c) => VisionTower::Dinov2(Dinov2::new(scope, c, depth)),
        }
    }
}

/// An image encoder.
#[derive(Debug)]
pub enum VisionTower {
    /// EVA-CLIP ViT-g's architecture.
    Blip2Vit(Blip2Vit),
    /// DINOv2.
    Dinov2(Dinov2),
}

impl VisionTower {
    /// Features of normalised pixels, computed without gradients.
    ///
    /// # Shapes
    /// `pixels f32 [B, 3, S, S]` with S a multiple of the patch size `-> f32 [B, 1 + (S/patch)^2, width]`.
    pub fn features(&self, pixels: &Tensor) -> Tensor {
        tch::no_grad(|| match self {
            VisionTower::Blip2Vit(tower) => tower.forward(pixels),
            VisionTower::Dinov2(tower) => tower.forward(pixels),
        })
    }
}

/// `[1, 1 + n^2, width]` position embeddings for a `grid x grid` input: the table itself where it fits, else its patch part resized
/// bicubically (`align_corners = false`, as `transformers` does for both towers), the class position kept.
pub(crate) fn position_embedding(table: &Tensor, grid: i64) -> Tensor {
    let table = table.to_kind(Kind::Float);
    let patches = table.size()[1] - 1;
    if patches == grid * grid {
        return table;
    }
    let side = (patches as f64).sqrt().round() as i64;
    let width = table.size()[2];
    let class = table.narrow(1, 0, 1);
    let patch = table.narrow(1, 1, patches).reshape([1, side, side, width]).permute([0, 3, 1, 2]);
    let resized = patch.upsample_bicubic2d([grid, grid], false, None, None);
    Tensor::cat(&[class, resized.permute([0, 2, 3, 1]).reshape([1, grid * grid, width])], 1)
}
