//! From pixels to the first hidden state: `[class | registers | patches]`.
//!
//! How a table of positions is brought to another grid, by the function of `transformers` that this follows:
//!
//! | tower | function | how |
//! |---|---|---|
//! | BLIP-2's ViT | `Blip2VisionEmbeddings.interpolate_pos_encoding` | bicubic to the size, `align_corners=False` |
//! | CLIP | `CLIPVisionEmbeddings.interpolate_pos_encoding` | the same |
//! | SigLIP | `SiglipVisionEmbeddings.interpolate_pos_encoding` | the same, without a class position |
//! | DINOv2 | `Dinov2Embeddings.interpolate_pos_encoding` | the same, in fp32 |
//! | DINOv2 with registers | `Dinov2WithRegistersEmbeddings.interpolate_pos_encoding` | the same in fp32, with `antialias=True` |
//! | ViT | `ViTEmbeddings.interpolate_pos_encoding` | as CLIP |
//! | AIMv2 | `Aimv2VisionEmbeddings.forward` | not at all; its native-resolution models compute sines for any size |
//! | DINOv3 | `DINOv3ViTRopePositionEmbedding.forward` | no table: rotations for any size |
//!
//! LAVIS' CLIP ViT-L interpolated with `align_corners=True`; here the tower is `transformers`' one.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::architecture::{Architecture, Positions, Resize, Rows};
use super::norm::Norm;
use super::positions::{Rotation, from_table, sines_and_cosines};

#[derive(Debug)]
pub(super) struct Embeddings {
    /// `[width, 3, patch, patch]` and `[width]`
    patch: (Tensor, Option<Tensor>),
    patch_norm: Option<Norm>,
    /// `[1, 1, width]`
    class: Option<Tensor>,
    /// `[1, registers, width]`
    registers: Option<Tensor>,
    places: Places,
    norm: Option<Norm>,
    patch_size: i64,
    width: i64,
}

#[derive(Debug)]
enum Places {
    Table(Tensor, Resize),
    SinCos,
    Rotary { theta: f64, head_size: i64 },
}

impl Embeddings {
    /// Declares them below `scope`.
    pub(super) fn new(scope: &Scope, a: &Architecture) -> Embeddings {
        let (parts, width, patch) = (&a.embeddings, a.width, a.patch_size);
        let conv = scope.pp(parts.patch.name);
        let norm = |name| Norm::new(&scope.pp(name), a);
        let tokens = |rows: Rows, count| {
            scope.param(rows.name, &rows.shape(count, width), Init::Normal(0.02)).view([1, count, width])
        };
        Embeddings {
            patch: (
                conv.param("weight", &[width, 3, patch, patch], Init::Normal(0.02)),
                parts.patch.bias.then(|| conv.param("bias", &[width], Init::Zeros)),
            ),
            patch_norm: parts.patch_norm.map(norm),
            class: parts.class.map(|rows| tokens(rows, 1)),
            registers: parts.registers.map(|(rows, count)| tokens(rows, count)),
            places: match parts.positions {
                Positions::Table(rows, resize) => {
                    let patches = (a.image_size / patch).pow(2);
                    Places::Table(tokens(rows, i64::from(parts.class.is_some()) + patches), resize)
                }
                Positions::SinCos => Places::SinCos,
                Positions::Rotary { theta } => Places::Rotary { theta, head_size: width / a.heads },
            },
            norm: parts.norm.map(norm),
            patch_size: patch,
            width,
        }
    }

    /// The first hidden state, and the rotation of every block's queries and keys where places are told that way.
    ///
    /// # Shapes
    /// `pixels f32 [B, 3, S, S] -> f32 [B, prefix + (S/patch)^2, width]`.
    pub(super) fn forward(&self, pixels: &Tensor) -> (Tensor, Option<Rotation>) {
        let (weight, bias) = &self.patch;
        let (kind, stride) = (weight.kind(), [self.patch_size; 2]);
        let patches = pixels.to_kind(kind).conv2d(weight, bias.as_ref(), stride, [0, 0], [1, 1], 1);
        let (batch, grid) = (patches.size()[0], patches.size()[2]);
        let patches = patches.flatten(2, 3).transpose(1, 2).to_kind(Kind::Float); // [B, grid^2, width]
        let patches = match &self.patch_norm {
            Some(norm) => norm.forward(&patches),
            None => patches,
        };

        let repeated = |tokens: &Tensor| tokens.to_kind(Kind::Float).expand([batch, -1, -1], false);
        let mut x = match &self.class {
            Some(class) => Tensor::cat(&[repeated(class), patches], 1),
            None => patches.contiguous(),
        };
        let classes = i64::from(self.class.is_some());
        let mut rotation = None;
        match self.places {
            Places::Table(ref table, resize) => x = from_table(table, classes, grid, resize) + x,
            Places::SinCos => x = &x + sines_and_cosines(grid, self.width, x.device()),
            Places::Rotary { theta, head_size } => {
                rotation = Some(Rotation::new(grid, head_size, theta, kind, x.device()));
            }
        }
        if let Some(registers) = &self.registers {
            let (class, patches) = (x.narrow(1, 0, classes), x.narrow(1, classes, grid * grid));
            x = Tensor::cat(&[class, repeated(registers), patches], 1);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(&x);
        }
        (x, rotation)
    }
}
