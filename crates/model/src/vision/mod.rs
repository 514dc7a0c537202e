//! Frozen image encoders.
//!
//! A tower returns `hidden_states[layer]` of `transformers` (0 = embeddings; CLIP's is behind `pre_layrnorm`). No tower's final norm is
//! applied, in the last layer either, where some classes of `transformers` put their normed output into the list. Blocks behind that
//! layer are not built. The residual stream is fp32, matrix products run in the storage dtype.
//!
//! | `model_type` | reference (`transformers` 4.57.1) | pixels: mean and deviation, filter |
//! |---|---|---|
//! | `aimv2_vision_model` | `Aimv2VisionModel` | CLIP's, bicubic (`CLIPImageProcessor`) |
//! | `blip_2_vision_model` | `Blip2VisionModel` | CLIP's, bicubic (`BlipImageProcessor`) |
//! | `clip_vision_model` | `CLIPVisionModel` | CLIP's, bicubic (`CLIPImageProcessor`) |
//! | `dinov2`, `dinov2_with_registers` | `Dinov2Model`, `Dinov2WithRegistersModel` | ImageNet's, bicubic (as converted for `BitImageProcessor`) |
//! | `dinov3_vit` | `DINOv3ViTModel` | ImageNet's, bilinear (`DINOv3ViTImageProcessorFast`) |
//! | `siglip_vision_model` | `SiglipVisionModel` | 0.5, bicubic (`SiglipImageProcessor`) |
//! | `vit` | `ViTModel` | 0.5, bilinear (`ViTImageProcessor`) |
//!
//! The last column holds where a directory has no `preprocessor_config.json`.

mod aimv2;
pub mod architecture;
mod blip2_vit;
mod block;
mod clip;
mod dinov2;
mod dinov3;
mod embeddings;
mod mlp;
mod norm;
mod positions;
mod siglip;
mod vit;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Tensor, no_grad};

use crate::config::ConfigError;
pub use architecture::Architecture;
use architecture::{PART, Positions, Resize};
use block::Block;
use embeddings::Embeddings;

/// CLIP's channel means, which BLIP-2's towers expect.
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// CLIP's channel standard deviations.
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// ImageNet's channel means.
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// ImageNet's channel standard deviations.
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
/// Means and standard deviations that bring pixels to [-1, 1].
pub const HALF: [f64; 3] = [0.5; 3];

/// Pillow's numbers of the filters that the families resize with.
const BILINEAR: u8 = 2;
const BICUBIC: u8 = 3;

/// A kind of towers. A new one is a file beside this one and a row of [`FAMILIES`].
struct Family {
    model_type: &'static str,
    /// Reads its `config.json`.
    architecture: fn(&Value) -> Result<Architecture, ConfigError>,
    /// Which hidden state is taken where the configuration leaves the choice.
    layer: i64,
    pixels: PixelDefaults,
}

/// What is done to pixels where no `preprocessor_config.json` says it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PixelDefaults {
    /// Mean of each of red, green, blue, of pixels in `[0, 1]`.
    pub mean: [f64; 3],
    /// Standard deviation of each.
    pub std: [f64; 3],
    /// Pillow's number of the filter that resizes.
    pub resample: u8,
}

const fn pixels(mean: [f64; 3], std: [f64; 3], resample: u8) -> PixelDefaults {
    PixelDefaults { mean, std, resample }
}

const CLIP_PIXELS: PixelDefaults = pixels(CLIP_MEAN, CLIP_STD, BICUBIC);

/// BLIP-2 takes the last hidden state of its own tower, which lacks ViT-g's last block; other towers' last layer serves another purpose.
const FAMILIES: [Family; 8] = [
    Family { model_type: "aimv2_vision_model", architecture: aimv2::architecture, layer: -2, pixels: CLIP_PIXELS },
    Family { model_type: "blip_2_vision_model", architecture: blip2_vit::architecture, layer: -1, pixels: CLIP_PIXELS },
    Family { model_type: "clip_vision_model", architecture: clip::architecture, layer: -2, pixels: CLIP_PIXELS },
    Family {
        model_type: "dinov2",
        architecture: dinov2::architecture,
        layer: -2,
        pixels: pixels(IMAGENET_MEAN, IMAGENET_STD, BICUBIC),
    },
    Family {
        model_type: "dinov2_with_registers",
        architecture: dinov2::architecture_with_registers,
        layer: -2,
        pixels: pixels(IMAGENET_MEAN, IMAGENET_STD, BICUBIC),
    },
    Family {
        model_type: "dinov3_vit",
        architecture: dinov3::architecture,
        layer: -2,
        pixels: pixels(IMAGENET_MEAN, IMAGENET_STD, BILINEAR),
    },
    Family {
        model_type: "siglip_vision_model",
        architecture: siglip::architecture,
        layer: -2,
        pixels: pixels(HALF, HALF, BICUBIC),
    },
    Family { model_type: "vit", architecture: vit::architecture, layer: -2, pixels: pixels(HALF, HALF, BILINEAR) },
];

/// The `model_type`s of [`FAMILIES`], and what is near to them and is not there.
const SUPPORTED: &str = "aimv2_vision_model, blip_2_vision_model, clip_vision_model, dinov2, dinov2_with_registers, dinov3_vit, \
     siglip_vision_model, vit (SigLIP 2 by its checkpoints of fixed resolution, whose model_type is siglip)";

/// A tower's configuration, by `model_type`.
#[derive(Debug, Clone)]
pub struct VisionConfig {
    architecture: Architecture,
    layer: i64,
    pixels: PixelDefaults,
}

impl VisionConfig {
    /// Reads a tower's `config.json` (or `vision_config`). Without a `model_type` it is BLIP-2's own.
    ///
    /// # Errors
    /// An unknown `model_type`, a mistyped key, a size that cannot be, a value that no code here computes.
    pub fn from_json(json: &Value) -> Result<VisionConfig, ConfigError> {
        let model_type = match json.get("model_type") {
            None | Some(Value::Null) => "blip_2_vision_model",
            Some(Value::String(model_type)) => model_type,
            Some(other) => return Err(unknown(other.to_string())),
        };
        let family = FAMILIES.iter().find(|family| family.model_type == model_type);
        let family = family.ok_or_else(|| unknown(model_type.into()))?;
        Ok(VisionConfig { architecture: (family.architecture)(json)?, layer: family.layer, pixels: family.pixels })
    }

    /// What the tower is made of.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Width of the features.
    pub fn hidden_size(&self) -> i64 {
        self.architecture.width
    }

    /// Blocks of the whole tower.
    pub fn num_hidden_layers(&self) -> i64 {
        self.architecture.blocks
    }

    /// The epsilon of its norms; `post_layernorm` takes it too, as `transformers` does (LAVIS: 1e-5).
    pub fn layer_norm_eps(&self) -> f64 {
        self.architecture.eps
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> i64 {
        self.architecture.patch_size
    }

    /// The input size that its positions were trained for.
    pub fn image_size(&self) -> i64 {
        self.architecture.image_size
    }

    /// Whether patches tile a square image of `size` pixels and the tower's positions can be brought to it. Its own size always will do: where
    /// patches do not tile that, the convolution leaves its last rows and columns out, as the reference's does (SigLIP's 384 by 14).
    ///
    /// # Errors
    /// Which sizes it takes.
    pub fn check_size(&self, size: i64) -> Result<(), String> {
        let (own, patch) = (self.image_size(), self.patch_size());
        if size == own {
            return Ok(());
        }
        if matches!(self.architecture.embeddings.positions, Positions::Table(_, Resize::Fixed)) {
            return Err(format!("{own}, the image encoder's own size, to which its positions are bound"));
        }
        if size >= patch && size % patch == 0 {
            return Ok(());
        }
        Err(format!("a multiple of the image encoder's patch of {patch} pixels"))
    }

    /// Feature tokens of a square image of `size` pixels: patches, class token and registers.
    pub fn tokens(&self, size: i64) -> i64 {
        (size / self.patch_size()).pow(2) + self.architecture.prefix_tokens()
    }

    /// Where the table of positions lies below the tower, and its shape for images of `size` pixels; none where it has no table.
    pub fn position_table(&self, size: i64) -> Option<(&'static str, Vec<i64>)> {
        match self.architecture.embeddings.positions {
            Positions::Table(rows, _) => {
                let rows_of_size = (size / self.patch_size()).pow(2) + self.class_tokens();
                Some((rows.name, rows.shape(rows_of_size, self.hidden_size())))
            }
            Positions::SinCos | Positions::Rotary { .. } => None,
        }
    }

    /// The table of positions as the tower computes it for images of `size` pixels.
    ///
    /// # Shapes
    /// `table` of the tower's own size by [`VisionConfig::position_table`] `-> f32` of the same for `size`.
    pub fn resized_positions(&self, table: &Tensor, size: i64) -> Tensor {
        let Positions::Table(rows, resize) = self.architecture.embeddings.positions else { return table.copy() };
        let table = table.view([1, -1, self.hidden_size()]);
        let resized = positions::from_table(&table, self.class_tokens(), size / self.patch_size(), resize);
        resized.view(rows.shape(resized.size()[1], self.hidden_size()).as_slice())
    }

    fn class_tokens(&self) -> i64 {
        i64::from(self.architecture.embeddings.class.is_some())
    }

    /// `hidden_states[layer]`'s depth: `layer` as `transformers` counts (negative from the end); `None` is -1 for BLIP-2's tower, -2 for
    /// others, whose last layer serves another purpose.
    ///
    /// # Errors
    /// A layer that the tower does not have.
    pub fn depth(&self, layer: Option<i64>) -> Result<i64, ConfigError> {
        let layers = self.num_hidden_layers();
        let layer = layer.unwrap_or(self.layer);
        let depth = if layer < 0 { layers.saturating_add(1).saturating_add(layer) } else { layer };
        if (0..=layers).contains(&depth) {
            return Ok(depth);
        }
        Err(ConfigError::Unsupported {
            part: PART,
            key: "layer",
            got: format!("{layer} of a tower with {layers} blocks"),
            supported: "-(blocks + 1) to blocks",
        })
    }

    /// How the tower's pixels were made, where its directory does not say.
    pub fn pixel_defaults(&self) -> PixelDefaults {
        self.pixels
    }

    /// Builds the first `depth` blocks below `scope`.
    pub fn build(&self, scope: &Scope, depth: i64) -> VisionTower {
        VisionTower::new(scope, &self.architecture, depth)
    }
}

fn unknown(got: String) -> ConfigError {
    ConfigError::Unsupported { part: PART, key: "model_type", got, supported: SUPPORTED }
}

/// An image encoder.
#[derive(Debug)]
pub struct VisionTower {
    embeddings: Embeddings,
    blocks: Vec<Block>,
}

impl VisionTower {
    /// Declares the embeddings and the first `depth` blocks below `scope`.
    pub fn new(scope: &Scope, architecture: &Architecture, depth: i64) -> VisionTower {
        let blocks = scope.pp(architecture.block.list);
        VisionTower {
            embeddings: Embeddings::new(scope, architecture),
            blocks: (0..depth).map(|i| Block::new(&blocks.pp(i), architecture)).collect(),
        }
    }

    /// Features of normalised pixels, computed without gradients.
    ///
    /// # Shapes
    /// `pixels f32 [B, 3, S, S] -> f32 [B, N, width]` with N of [`VisionConfig::tokens`].
    ///
    /// # Panics
    /// For a size that [`VisionConfig::check_size`] refuses.
    pub fn features(&self, pixels: &Tensor) -> Tensor {
        no_grad(|| {
            let (x, rotation) = self.embeddings.forward(pixels);
            self.blocks.iter().fold(x, |x, block| block.forward(&x, rotation.as_ref()))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<VisionConfig, String> {
        VisionConfig::from_json(&json).map_err(|error| error.to_string())
    }

    #[test]
    fn the_message_about_an_unknown_model_type_lists_every_family() {
        let listed: Vec<&str> = SUPPORTED.split(" (").next().unwrap().split(", ").collect();
        assert_eq!(listed, FAMILIES.map(|family| family.model_type));
        for (model_type, got) in [
            (json!("resnet"), "got resnet,"),
            (json!("siglip2_vision_model"), "got siglip2_vision_model,"),
            (json!(7), "got 7,"),
        ] {
            let message = read(json!({"model_type": model_type})).unwrap_err();
            assert!(message.contains(got) && message.contains(SUPPORTED), "{message}");
        }
    }

    #[test]
    fn a_configuration_that_says_its_model_type_alone_is_the_family_s_default() {
        // width, blocks, patch, tokens at 224 pixels
        for (model_type, expected) in [
            ("aimv2_vision_model", [1024, 24, 14, 256]),
            ("blip_2_vision_model", [1408, 39, 14, 257]),
            ("clip_vision_model", [768, 12, 32, 50]),
            ("dinov2", [768, 12, 14, 257]),
            ("dinov2_with_registers", [768, 12, 16, 201]),
            ("dinov3_vit", [384, 12, 16, 197]),
            ("siglip_vision_model", [768, 12, 16, 196]),
            ("vit", [768, 12, 16, 197]),
        ] {
            let c = read(json!({"model_type": model_type})).unwrap();
            assert_eq!(
                [c.hidden_size(), c.num_hidden_layers(), c.patch_size(), c.tokens(224)],
                expected,
                "{model_type}"
            );
        }
    }

    #[test]
    fn values_that_no_code_computes_are_refused_by_key() {
        for (more, expected) in [
            (json!({"hidden_act": "relu"}), "vision_config.hidden_act: got relu, supported: gelu, "),
            (json!({"num_attention_heads": 5}), "num_attention_heads: got 5 for width 768, supported: a divisor"),
            (json!({"num_attention_heads": 0}), "num_attention_heads: got 0, supported: 1 to 1,000"),
            (json!({"patch_size": 225}), "patch_size: got 225 for images of 224, supported: at most image_size"),
            (json!({"num_channels": 1}), "num_channels: got 1, supported: 3"),
            (json!({"num_register_tokens": -1}), "num_register_tokens: got -1, supported: 0 to 2^16"),
            (json!({"mlp_ratio": -1}), "mlp_ratio: got -1, supported: a positive number"),
            (json!({"hidden_size": "wide"}), "invalid type: string \"wide\""),
        ] {
            let mut config = json!({"model_type": "dinov2_with_registers"});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let message = read(config).unwrap_err();
            assert!(message.contains(expected) && message.lines().count() == 1, "{message}");
        }
        let message = read(json!({"model_type": "dinov3_vit", "hidden_size": 36})).unwrap_err();
        assert!(message.contains("heads whose size is a multiple of 4"), "{message}");
        let message = read(json!({"model_type": "aimv2_vision_model", "hidden_size": 24, "is_native": true}));
        assert!(message.is_ok());
        let odd =
            json!({"model_type": "aimv2_vision_model", "hidden_size": 22, "num_attention_heads": 1, "is_native": true});
        assert!(read(odd).unwrap_err().contains("hidden_size: got 22, supported: a multiple of 4"));
    }

    #[test]
    fn a_size_must_be_the_tower_s_own_or_tiled_by_its_patches() {
        let siglip = read(json!({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14})).unwrap();
        assert_eq!([384, 378, 14].map(|size| siglip.check_size(size)), [Ok(()), Ok(()), Ok(())]);
        assert_eq!(siglip.tokens(384), 27 * 27);
        for size in [380, 0, -14] {
            assert_eq!(siglip.check_size(size).unwrap_err(), "a multiple of the image encoder's patch of 14 pixels");
        }
        let aimv2 = read(json!({"model_type": "aimv2_vision_model"})).unwrap();
        assert!(aimv2.check_size(224).is_ok() && aimv2.check_size(448).unwrap_err().starts_with("224, "));
        let native = read(json!({"model_type": "aimv2_vision_model", "is_native": true})).unwrap();
        assert!(native.check_size(448).is_ok());
    }

    #[test]
    fn the_default_layer_is_the_last_of_blip_2_s_tower_and_the_one_before_of_others() {
        let depth = |model_type: &str, layer| read(json!({"model_type": model_type})).unwrap().depth(layer);
        assert_eq!(depth("blip_2_vision_model", None).unwrap(), 39);
        assert_eq!(depth("clip_vision_model", None).unwrap(), 11);
        assert_eq!([0, 12, -1, -13].map(|layer| depth("vit", Some(layer)).unwrap()), [0, 12, 12, 0]);
        for layer in [13, -14, i64::MIN] {
            assert!(depth("vit", Some(layer)).unwrap_err().to_string().contains("-(blocks + 1) to blocks"));
        }
    }
}
