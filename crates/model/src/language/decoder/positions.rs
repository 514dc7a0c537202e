//! Positions: rotation of queries and keys, or a learned table added to the embeddings.

use blip2_torchx::params::{Init, Scope};
use tch::{Device, Kind, Tensor};

use super::config::DecoderConfig;
use super::rope_scaling::RotaryConfig;

/// Frequencies of one rotary table, in f32 whatever the model's dtype.
#[derive(Debug)]
pub(super) struct Rotary {
    frequencies: Tensor,
    /// Those of texts longer than so many positions, where they differ.
    long: Option<(Tensor, i64)>,
    factor: f64,
}

/// Rotation of the rows at hand, `[B or 1, 1, L, size]`, in the model's dtype.
#[derive(Debug)]
pub(super) struct Rotation {
    cos: Tensor,
    sin: Tensor,
    size: i64,
}

/// A table of positions that were learned.
#[derive(Debug)]
pub(super) struct LearnedPositions {
    weight: Tensor,
    offset: i64,
}

impl Rotary {
    pub(super) fn new(config: &RotaryConfig, device: Device) -> Rotary {
        let (frequencies, long, factor) = config.frequencies(device);
        Rotary { frequencies, long, factor }
    }

    /// The rotation at `positions i64 [B or 1, L]` of a text of `length` positions so far.
    ///
    /// # Differs from the reference
    /// LongRoPE's long factors begin behind the original length; keys that were cached before keep the short ones, which Phi-3's class in
    /// `transformers` computes anew, and the other classes keep as well.
    pub(super) fn at(&self, positions: &Tensor, length: i64, kind: Kind) -> Rotation {
        let frequencies = match &self.long {
            Some((long, original)) if length > *original => long,
            _ => &self.frequencies,
        };
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies; // [B, L, size/2]
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1);
        let scaled = |t: Tensor| if self.factor == 1.0 { t } else { t * self.factor }.to_kind(kind);
        Rotation { cos: scaled(angles.cos()), sin: scaled(angles.sin()), size: 2 * frequencies.size()[0] }
    }
}

impl Rotation {
    /// Turns the two halves of each head's first numbers: `x cos + (-x2, x1) sin`.
    ///
    /// # Shapes
    /// `x [B, heads, L, head size]`, as the result.
    pub(super) fn apply(&self, x: &Tensor) -> Tensor {
        let head = x.size()[3];
        if self.size == head {
            return self.turn(x);
        }
        let parts = x.split_with_sizes([self.size, head - self.size], -1);
        Tensor::cat(&[&self.turn(&parts[0]), &parts[1]], -1)
    }

    fn turn(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * &self.cos + turned * &self.sin
    }
}

impl LearnedPositions {
    /// Declares the table below the base model's `scope`.
    pub(super) fn new(scope: &Scope, c: &DecoderConfig, count: i64, offset: i64) -> LearnedPositions {
        let table = [count + offset, c.width];
        LearnedPositions { weight: scope.pp(c.names.positions).param("weight", &table, Init::Normal(0.02)), offset }
    }

    /// `positions i64 [B or 1, L] -> [B or 1, L, width]`.
    pub(super) fn at(&self, positions: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, &(positions + self.offset), -1, false, false)
    }
}
