//! The layers that every tower is made of.

use blip2_torchx::dropout::attention;
use blip2_torchx::params::{Init, Scope};
use tch::{Device, Kind, Tensor};

/// `y = x W^T + b`.
///
/// # Shapes
/// `weight [out, in]`, `bias [out]`; `x [.., in] -> [.., out]`.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Linear {
    /// BERT's initialisation: weights N(0, 0.02), bias 0.
    pub fn bert(scope: &Scope, input: i64, output: i64) -> Linear {
        Linear {
            weight: scope.param("weight", &[output, input], Init::Normal(0.02)),
            bias: Some(scope.param("bias", &[output], Init::Zeros)),
        }
    }

    /// `torch.nn.Linear`'s initialisation: both uniform in 1/sqrt(input).
    pub fn default_init(scope: &Scope, input: i64, output: i64) -> Linear {
        let bound = 1.0 / (input as f64).sqrt();
        Linear {
            weight: scope.param("weight", &[output, input], Init::Uniform(bound)),
            bias: Some(scope.param("bias", &[output], Init::Uniform(bound))),
        }
    }

    /// A layer without values of its own yet (frozen towers), with or without bias.
    pub fn plain(scope: &Scope, input: i64, output: i64, bias: bool) -> Linear {
        Linear {
            weight: scope.param("weight", &[output, input], Init::Normal(0.02)),
            bias: bias.then(|| scope.param("bias", &[output], Init::Zeros)),
        }
    }

    /// Applies the layer.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// Layer normalisation over the last axis.
#[derive(Debug)]
pub struct LayerNorm {
    /// `[width]`
    pub weight: Tensor,
    /// `[width]`
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Starts as (1, 0).
    pub fn new(scope: &Scope, width: i64, eps: f64) -> LayerNorm {
        LayerNorm {
            weight: scope.param("weight", &[width], Init::Ones),
            bias: scope.param("bias", &[width], Init::Zeros),
            eps,
        }
    }

    /// Applies the layer; the result has the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }

    /// Applies the layer to an fp32 residual stream whatever dtype the parameters are stored in.
    pub fn forward_f32(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.to_kind(Kind::Float), self.bias.to_kind(Kind::Float));
        x.layer_norm(self.weight.size(), Some(&weight), Some(&bias), self.eps, true)
    }
}

/// RMSNorm before its weight: `x / sqrt(mean(x^2) + eps)` over the last axis, computed and returned in f32.
pub fn root_mean_square(x: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let mean_square = (&wide * &wide).mean_dim([-1i64].as_slice(), true, Kind::Float);
    wide * (mean_square + eps).rsqrt()
}

/// `[.., heads * size] -> [batch, heads, rows, size]` of `x [batch, rows, heads * size]`.
pub fn split_heads(x: &Tensor, heads: i64) -> Tensor {
    let (batch, rows, width) = x.size3().expect("rank 3: [batch, rows, width]");
    x.view([batch, rows, heads, width / heads]).transpose(1, 2)
}

/// The inverse of [`split_heads`].
pub fn merge_heads(x: &Tensor) -> Tensor {
    let (batch, heads, rows, size) = x.size4().expect("rank 4: [batch, heads, rows, size]");
    x.transpose(1, 2).reshape([batch, rows, heads * size])
}

/// Scaled dot-product attention without dropout.
///
/// # Shapes
/// `q [B, H, N, D]`, `k, v [B, H, M, D]`; `mask` is boolean (true = may attend) and broadcasts to `[B, H, N, M]`.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
    attention(q, k, v, mask, 0.0, None)
}

/// Attention of each row to itself and the rows before it: `q, k, v [B, H, N, D]`.
pub fn attend_causally(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    if q.device() == Device::Cpu && q.kind() == Kind::BFloat16 {
        let rows = q.size()[2];
        let mask = Tensor::ones([1, 1, rows, rows], (Kind::Bool, q.device())).tril(0);
        return attend(q, k, v, Some(&mask));
    }
    Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, true, None, false)
}
