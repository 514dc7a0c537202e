//! Where a patch stands: tables with their interpolation, sines and cosines, rotations.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

use super::architecture::Resize;

/// Period of the slowest of AIMv2's sines, over 2 pi.
const SINCOS_BASE: f64 = 10_000.0;

/// A table of positions for a `grid x grid` input: the table itself where it fits, else its patch part resized, what stands in front of
/// it kept.
///
/// # Shapes
/// `table [.., prefix + n^2, width] -> f32 [1, prefix + grid^2, width]`.
pub(super) fn from_table(table: &Tensor, prefix: i64, grid: i64, resize: Resize) -> Tensor {
    let width = table.size().last().copied().unwrap_or(1);
    let table = table.to_kind(Kind::Float).view([1, -1, width]);
    let patches = table.size()[1] - prefix;
    if patches == grid * grid || resize == Resize::Fixed {
        return table;
    }
    let side = (patches as f64).sqrt().round() as i64;
    let rows = table.narrow(1, prefix, patches).reshape([1, side, side, width]).permute([0, 3, 1, 2]);
    let resized = if resize == Resize::BicubicAntialiased {
        rows.internal_upsample_bicubic2d_aa([grid, grid], false, None, None)
    } else {
        rows.upsample_bicubic2d([grid, grid], false, None, None)
    };
    let resized = resized.permute([0, 2, 3, 1]).reshape([1, grid * grid, width]);
    Tensor::cat(&[table.narrow(1, 0, prefix), resized], 1)
}

/// Sines and cosines of a patch's column, then of its row (AIMv2's native-resolution models).
///
/// # Shapes
/// Returns `f32 [1, grid^2, width]`.
pub(super) fn sines_and_cosines(grid: i64, width: i64, device: Device) -> Tensor {
    let steps = width / 4;
    let frequencies = powers(SINCOS_BASE, steps, device);
    let numbers = Tensor::arange(grid, (Kind::Float, device));
    let angles = numbers.view([-1, 1]) * frequencies.view([1, -1]); // [grid, width / 4]
    let waves = Tensor::cat(&[angles.sin(), angles.cos()], 1); // [grid, width / 2]
    let shape = [grid, grid, 2 * steps];
    let (columns, rows) = (waves.unsqueeze(0).expand(shape, false), waves.unsqueeze(1).expand(shape, false));
    Tensor::cat(&[columns, rows], 2).reshape([1, grid * grid, 4 * steps])
}

/// `base^(-i / steps)` for `i` below `steps`, `f32 [steps]`.
fn powers(base: f64, steps: i64, device: Device) -> Tensor {
    let exponents = Tensor::arange(steps, (Kind::Float, device)) * (-base.ln() / steps as f64);
    exponents.exp()
}

/// The rotation of queries and keys by a patch's place (DINOv3): half of the angles are of its row, half of its column, both from -1 to 1
/// over the image whatever its size. Tokens in front of the patches are not turned.
#[derive(Debug)]
pub(super) struct Rotation {
    /// `[grid^2, head size]`
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// For heads of `head_size`, in the dtype of queries and keys.
    pub(super) fn new(grid: i64, head_size: i64, theta: f64, kind: Kind, device: Device) -> Rotation {
        let steps = head_size / 4;
        let centres = (Tensor::arange(grid, (Kind::Float, device)) + 0.5) / grid as f64 * 2.0 - 1.0;
        let angles = centres.view([-1, 1]) * powers(theta, steps, device).view([1, -1]) * TAU; // [grid, head size / 4]
        let shape = [grid, grid, steps];
        let (rows, columns) = (angles.unsqueeze(1).expand(shape, false), angles.unsqueeze(0).expand(shape, false));
        let half = Tensor::cat(&[rows, columns], 2).reshape([grid * grid, 2 * steps]);
        let angles = Tensor::cat(&[&half, &half], 1);
        Rotation { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind) }
    }

    /// `x [B, heads, prefix + grid^2, size]`, the patches' part of it turned.
    pub(super) fn turn(&self, x: &Tensor) -> Tensor {
        let patches = self.cos.size()[0];
        let prefix = x.size()[2] - patches;
        let still = x.narrow(2, 0, prefix);
        let moved = x.narrow(2, prefix, patches);
        let halves = moved.chunk(2, -1);
        let quarter_turned = Tensor::cat(&[&halves[1].neg(), &halves[0]], -1);
        Tensor::cat(&[still, &moved * &self.cos + quarter_turned * &self.sin], 2)
    }
}
