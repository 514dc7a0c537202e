//! The feed-forward network: plain, or gated as in SwiGLU and GeGLU.

use blip2_torchx::params::Scope;
use tch::Tensor;

use super::config::DecoderConfig;
use super::projection::{Projection, Projections};
use crate::activation::Activation;

#[derive(Debug)]
pub(super) struct Mlp {
    inner: Projections,
    output: Projection,
    activation: Activation,
}

impl Mlp {
    /// Declares the network below a layer's `scope`.
    pub(super) fn new(scope: &Scope, c: &DecoderConfig) -> Mlp {
        let (mlp, names) = (&c.mlp, &c.names);
        let widths = vec![mlp.inner; if mlp.gated { 2 } else { 1 }];
        Mlp {
            inner: Projections::new(scope, names.mlp_in, c.width, &widths, mlp.bias, names.input_major),
            output: Projection::new(&scope.pp(names.mlp_out), mlp.inner, c.width, mlp.bias, names.input_major),
            activation: mlp.activation,
        }
    }

    /// `x [B, L, width] -> [B, L, width]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let inner = self.inner.forward(x);
        let activated = self.activation.apply(&inner[0]);
        self.output.forward(&inner[1..].iter().fold(activated, |gate, up| gate * up))
    }
}
