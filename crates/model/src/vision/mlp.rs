//! The MLP of a block.

use blip2_torchx::params::Scope;
use tch::Tensor;

use super::architecture::{Affine, Architecture, MlpParts, PART};
use crate::activation::Activation;
use crate::config::ConfigError;
use crate::layers::Linear;

/// The activation that `hidden_act` names, by its names in `transformers`' `ACT2FN`.
///
/// # Errors
/// A name that no tower here uses.
pub(super) fn activation(name: &str) -> Result<Activation, ConfigError> {
    match name {
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "quick_gelu" => Ok(Activation::QuickGelu),
        "silu" | "swish" => Ok(Activation::Silu),
        other => Err(ConfigError::Unsupported {
            part: PART,
            key: "hidden_act",
            got: other.into(),
            supported: "gelu, gelu_pytorch_tanh, gelu_new, quick_gelu, silu, swish",
        }),
    }
}

#[derive(Debug)]
pub(super) struct Mlp {
    input: Input,
    output: Linear,
    activation: Activation,
}

#[derive(Debug)]
enum Input {
    Plain(Linear),
    Gated {
        gate: Linear,
        up: Linear,
    },
    /// `[2 inner, width]`: gate, up.
    PackedGated(Linear),
}

impl Mlp {
    /// Declares it below its block.
    pub(super) fn new(scope: &Scope, a: &Architecture) -> Mlp {
        let (width, inner) = (a.width, a.inner);
        let linear = |part: Affine, from, to| Linear::plain(&scope.pp(part.name), from, to, part.bias);
        let (input, output) = match a.block.mlp {
            MlpParts::Plain([input, output]) => (Input::Plain(linear(input, width, inner)), output),
            MlpParts::Gated([gate, up, output]) => {
                (Input::Gated { gate: linear(gate, width, inner), up: linear(up, width, inner) }, output)
            }
            MlpParts::PackedGated([input, output]) => (Input::PackedGated(linear(input, width, 2 * inner)), output),
        };
        Mlp { input, output: linear(output, inner, width), activation: a.block.activation }
    }

    /// `[B, N, width] -> [B, N, width]` in the storage dtype.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let inner = match &self.input {
            Input::Plain(input) => self.activation.apply(&input.forward(x)),
            Input::Gated { gate, up } => self.activation.apply(&gate.forward(x)) * up.forward(x),
            Input::PackedGated(input) => {
                let both = input.forward(x).chunk(2, -1);
                self.activation.apply(&both[0]) * &both[1]
            }
        };
        self.output.forward(&inner)
    }
}
