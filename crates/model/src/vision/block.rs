//! The pre-norm block that every tower is a stack of.
//!
//! ```text
//! x = x + scale1 * output(heads(q, k, v of norm1(x)))
//! x = x + scale2 * mlp(norm2(x))
//! ```

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::architecture::{Affine, Architecture, Qkv};
use super::mlp::Mlp;
use super::norm::Norm;
use super::positions::Rotation;
use crate::layers::{Linear, attend, merge_heads, split_heads};

#[derive(Debug)]
pub(super) struct Block {
    norm1: Norm,
    qkv: Projections,
    output: Linear,
    norm2: Norm,
    mlp: Mlp,
    /// LayerScale of both branches, `[width]` each.
    scales: Option<[Tensor; 2]>,
    heads: i64,
    /// The storage dtype, in which matrix products run.
    kind: Kind,
}

#[derive(Debug)]
enum Projections {
    Fused(Linear),
    Separate([Linear; 3]),
}

impl Block {
    /// Declares it below `scope`.
    pub(super) fn new(scope: &Scope, a: &Architecture) -> Block {
        let parts = &a.block;
        let linear = |part: Affine, to| Linear::plain(&scope.pp(part.name), a.width, to, part.bias);
        let output = linear(parts.output, a.width);
        Block {
            norm1: Norm::new(&scope.pp(parts.norm1), a),
            qkv: match parts.qkv {
                Qkv::Fused(part) => Projections::Fused(linear(part, 3 * a.width)),
                Qkv::Separate(parts) => Projections::Separate(parts.map(|part| linear(part, a.width))),
            },
            norm2: Norm::new(&scope.pp(parts.norm2), a),
            mlp: Mlp::new(scope, a),
            scales: parts.layer_scale.map(|names| names.map(|name| scope.param(name, &[a.width], Init::Ones))),
            heads: a.heads,
            kind: output.weight.kind(),
            output,
        }
    }

    /// `x f32 [B, N, width] -> f32 [B, N, width]`; `rotation` turns queries and keys of the patches.
    pub(super) fn forward(&self, x: &Tensor, rotation: Option<&Rotation>) -> Tensor {
        let normed = self.norm1.forward(x).to_kind(self.kind);
        let [q, k, v] = self.qkv.forward(&normed, self.heads);
        let attended = match rotation {
            Some(rotation) => attend(&rotation.turn(&q), &rotation.turn(&k), &v, None),
            None => attend(&q, &k, &v, None),
        };
        let x = x + self.scaled(0, self.output.forward(&merge_heads(&attended)));
        let normed = self.norm2.forward(&x).to_kind(self.kind);
        &x + self.scaled(1, self.mlp.forward(&normed))
    }

    fn scaled(&self, branch: usize, x: Tensor) -> Tensor {
        let x = x.to_kind(Kind::Float);
        match &self.scales {
            Some(scales) => x * scales[branch].to_kind(Kind::Float),
            None => x,
        }
    }
}

impl Projections {
    /// `x [B, N, width] ->` query, key, value `[B, heads, N, size]`.
    fn forward(&self, x: &Tensor, heads: i64) -> [Tensor; 3] {
        match self {
            Projections::Fused(linear) => {
                let qkv = linear.forward(x).chunk(3, -1);
                [0, 1, 2].map(|i| split_heads(&qkv[i].contiguous(), heads))
            }
            Projections::Separate(linears) => linears.each_ref().map(|l| split_heads(&l.forward(x), heads)),
        }
    }
}
