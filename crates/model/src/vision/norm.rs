//! Norms of an fp32 residual stream.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::architecture::{Architecture, NormKind};
use crate::layers::{LayerNorm, root_mean_square};

/// LayerNorm or RMSNorm over the last axis.
#[derive(Debug)]
pub(super) enum Norm {
    Layer(LayerNorm),
    /// Weight `[width]` and what is added to the mean square.
    Rms(Tensor, f64),
}

impl Norm {
    pub(super) fn new(scope: &Scope, a: &Architecture) -> Norm {
        match a.norm {
            NormKind::Layer => Norm::Layer(LayerNorm::new(scope, a.width, a.eps)),
            NormKind::Rms => Norm::Rms(scope.param("weight", &[a.width], Init::Ones), a.eps),
        }
    }

    /// `f32 [.., width] -> f32 [.., width]`, whatever dtype the parameters are stored in.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Norm::Layer(norm) => norm.forward_f32(x),
            Norm::Rms(weight, eps) => root_mean_square(x, *eps) * weight.to_kind(Kind::Float),
        }
    }
}
