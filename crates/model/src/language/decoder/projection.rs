//! Linear layers of decoders: stored either way round, and several of the same input in one weight or in several.

use blip2_torchx::params::{Init, Scope};
use tch::Tensor;

/// `y = x W^T + b`, or `y = x W + b` where the weight is stored `[in, out]`.
#[derive(Debug)]
pub(super) struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
    input_major: bool,
}

/// Several projections of one input.
#[derive(Debug)]
pub(super) enum Projections {
    /// Each with its own weight.
    Separate(Vec<Projection>),
    /// One weight, whose outputs lie side by side in these widths.
    Fused(Projection, Vec<i64>),
}

impl Projection {
    pub(super) fn new(scope: &Scope, input: i64, output: i64, bias: bool, input_major: bool) -> Projection {
        let shape = if input_major { [input, output] } else { [output, input] };
        Projection {
            weight: scope.param("weight", &shape, Init::Normal(0.02)),
            bias: bias.then(|| scope.param("bias", &[output], Init::Zeros)),
            input_major,
        }
    }

    /// `x [.., in] -> [.., out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        if self.input_major {
            return x.linear(&self.weight.transpose(0, 1), self.bias.as_ref());
        }
        x.linear(&self.weight, self.bias.as_ref())
    }
}

impl Projections {
    /// One name for several outputs means that they are fused.
    pub(super) fn new(
        scope: &Scope,
        names: &[&str],
        input: i64,
        outputs: &[i64],
        bias: bool,
        input_major: bool,
    ) -> Projections {
        let one = |name: &str, output: i64| Projection::new(&scope.pp(name), input, output, bias, input_major);
        match names {
            [name] if outputs.len() > 1 => Projections::Fused(one(name, outputs.iter().sum()), outputs.to_vec()),
            _ => Projections::Separate(names.iter().zip(outputs).map(|(name, &output)| one(name, output)).collect()),
        }
    }

    /// `x [.., in] -> [.., out]` for each output.
    pub(super) fn forward(&self, x: &Tensor) -> Vec<Tensor> {
        match self {
            Projections::Separate(each) => each.iter().map(|projection| projection.forward(x)).collect(),
            Projections::Fused(projection, widths) => projection.forward(x).split_with_sizes(widths.as_slice(), -1),
        }
    }
}
