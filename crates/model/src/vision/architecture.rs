//! What a vision transformer is made of: the parts that its family and its `config.json` choose, with their Hugging Face names.
//!
//! Every tower here is a pre-norm transformer over patches. What differs is a short list: which tokens stand in front of the patches,
//! how a patch learns its place, where there are further norms, whether query, key and value are one matrix, what the MLP computes,
//! whether a branch is scaled. A family's file reads its configuration into an [`Architecture`]; [`VisionTower`](super::VisionTower)
//! builds any of them.

use serde_json::Value;

use crate::activation::Activation;
use crate::config::{ConfigError, check_sizes, parse};

pub(super) const PART: &str = "vision_config";

/// A pre-norm vision transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// Width of a token.
    pub width: i64,
    /// Inner width of the MLP.
    pub inner: i64,
    /// Attention heads; a divisor of the width.
    pub heads: i64,
    /// Blocks of the whole tower.
    pub blocks: i64,
    /// Side in pixels of the square images that it was trained on.
    pub image_size: i64,
    /// Side of a patch in pixels.
    pub patch_size: i64,
    /// What its norms compute.
    pub norm: NormKind,
    /// Added to the variance in every norm.
    pub eps: f64,
    /// From pixels to the first hidden state.
    pub embeddings: EmbeddingParts,
    /// From one hidden state to the next.
    pub block: BlockParts,
}

/// What a norm computes over the last axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// LayerNorm, with weight and bias.
    Layer,
    /// RMSNorm: no mean, no bias.
    Rms,
}

/// The name of a projection below its block, and whether it has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// Its module.
    pub name: &'static str,
    /// Whether it adds a bias.
    pub bias: bool,
}

/// Learned token rows: `[width]`, `[rows, width]` or `[1, rows, width]` in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Its parameter.
    pub name: &'static str,
    /// Axes that it has in the file.
    pub axes: usize,
}

/// From pixels to the first hidden state.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingParts {
    /// The convolution over patches.
    pub patch: Affine,
    /// A norm of the patches before they learn their place.
    pub patch_norm: Option<&'static str>,
    /// The class token, which stands first.
    pub class: Option<Rows>,
    /// Register tokens between class token and patches, without a position, and their number.
    pub registers: Option<(Rows, i64)>,
    /// How a patch learns its place.
    pub positions: Positions,
    /// A norm of all tokens, whose output is the first hidden state.
    pub norm: Option<&'static str>,
}

/// How a patch learns its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// A row of a table is added: first the class token's, then those of the patches, row by row.
    Table(Rows, Resize),
    /// Sines and cosines of column and row are added.
    SinCos,
    /// Queries and keys of patches are rotated by angles of row and column.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
    },
}

/// How a table of positions is brought to another grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// Bicubic between pixel centres (`align_corners=False`).
    Bicubic,
    /// The same with the kernel widened for shrinking (`antialias=True`, whose cubic also has another coefficient).
    BicubicAntialiased,
    /// Not at all: the reference refuses other sizes.
    Fixed,
}

/// From one hidden state to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockParts {
    /// What stands in front of a block's number.
    pub list: &'static str,
    /// The norm in front of the attention.
    pub norm1: &'static str,
    /// Query, key and value.
    pub qkv: Qkv,
    /// The projection behind the heads.
    pub output: Affine,
    /// The norm in front of the MLP.
    pub norm2: &'static str,
    /// The MLP.
    pub mlp: MlpParts,
    /// Its activation.
    pub activation: Activation,
    /// LayerScale of both branches.
    pub layer_scale: Option<[&'static str; 2]>,
}

/// The projections in front of the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// One matrix `[3 width, width]`: query, key, value.
    Fused(Affine),
    /// Query, key, value.
    Separate([Affine; 3]),
}

/// What an MLP computes; `a` is its activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpParts {
    /// `out(a(in x))`: in, out.
    Plain([Affine; 2]),
    /// `out(a(gate x) * (up x))`: gate, up, out.
    Gated([Affine; 3]),
    /// The same with gate and up in one matrix `[2 inner, width]`: in, out.
    PackedGated([Affine; 2]),
}

impl Affine {
    /// With a bias.
    pub(super) const fn biased(name: &'static str) -> Affine {
        Affine { name, bias: true }
    }
}

impl Rows {
    /// The shape of `rows` rows in the file.
    pub(super) fn shape(self, rows: i64, width: i64) -> Vec<i64> {
        let whole = [1, rows, width];
        whole[whole.len() - self.axes.clamp(1, whole.len())..].to_vec()
    }
}

impl Architecture {
    /// Tokens in front of the patches.
    pub fn prefix_tokens(&self) -> i64 {
        i64::from(self.embeddings.class.is_some()) + self.embeddings.registers.map_or(0, |(_, count)| count)
    }

    /// Returns it if every size can be; `channels` of a pixel must be three.
    pub(super) fn checked(self, channels: i64) -> Result<Architecture, ConfigError> {
        check_sizes(
            PART,
            &[
                ("hidden_size", self.width),
                ("intermediate_size", self.inner),
                ("num_hidden_layers", self.blocks),
                ("num_attention_heads", self.heads),
                ("image_size", self.image_size),
                ("patch_size", self.patch_size),
            ],
        )?;
        let registers = self.embeddings.registers.map_or(0, |(_, count)| count);
        let head_size = self.width / self.heads;
        let wrong = |key, got: String, supported| Err(ConfigError::Unsupported { part: PART, key, got, supported });
        if self.width % self.heads != 0 {
            return wrong(
                "num_attention_heads",
                format!("{} for width {}", self.heads, self.width),
                "a divisor of hidden_size",
            );
        }
        if self.patch_size > self.image_size {
            let got = format!("{} for images of {}", self.patch_size, self.image_size);
            return wrong("patch_size", got, "at most image_size");
        }
        if channels != 3 {
            return wrong("num_channels", channels.to_string(), "3");
        }
        if !(0..=1 << 16).contains(&registers) {
            return wrong("num_register_tokens", registers.to_string(), "0 to 2^16");
        }
        match self.embeddings.positions {
            Positions::Rotary { .. } if head_size % 4 != 0 => {
                let got = format!("{} for width {}", self.heads, self.width);
                wrong("num_attention_heads", got, "heads whose size is a multiple of 4, for rotary positions")
            }
            Positions::Rotary { theta } if !(theta.is_finite() && theta > 0.0) => {
                wrong("rope_theta", theta.to_string(), "a positive number")
            }
            Positions::SinCos if self.width % 4 != 0 => {
                wrong("hidden_size", self.width.to_string(), "a multiple of 4, for positions as sines and cosines")
            }
            _ => Ok(self),
        }
    }
}

/// Reads a family's configuration.
pub(super) fn read<T: serde::de::DeserializeOwned>(json: &Value) -> Result<T, ConfigError> {
    parse(PART, json)
}
