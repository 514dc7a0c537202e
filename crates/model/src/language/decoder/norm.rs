//! Norms of decoders: layer normalisation and root mean square, in the order of operations of `transformers`.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::config::{NormConfig, NormKind, NormNames};
use crate::layers::root_mean_square;

/// A norm over the last axis.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    config: NormConfig,
    width: i64,
}

/// The norms around a sub-layer; see [`NormNames`].
#[derive(Debug)]
pub(super) struct Norms {
    before: Option<Norm>,
    after: Option<Norm>,
    outer: Option<Norm>,
}

impl Norm {
    pub(super) fn new(scope: &Scope, width: i64, config: NormConfig) -> Norm {
        let affine = config.kind != NormKind::Layer { affine: false };
        let shifted = config.kind == NormKind::Layer { affine: true };
        let start = if config.kind == NormKind::RmsOnePlus { Init::Zeros } else { Init::Ones };
        Norm {
            weight: affine.then(|| scope.param("weight", &[width], start)),
            bias: shifted.then(|| scope.param("bias", &[width], Init::Zeros)),
            config,
            width,
        }
    }

    /// `x [.., width] -> [.., width]` in the dtype of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        match (self.config.kind, &self.weight) {
            (NormKind::Rms, Some(weight)) => root_mean_square(x, self.config.eps).to_kind(x.kind()) * weight,
            (NormKind::RmsOnePlus, Some(weight)) => {
                (root_mean_square(x, self.config.eps) * (weight.to_kind(Kind::Float) + 1.0)).to_kind(x.kind())
            }
            (_, weight) => x.layer_norm([self.width], weight.as_ref(), self.bias.as_ref(), self.config.eps, true),
        }
    }
}

impl Norms {
    pub(super) fn new(scope: &Scope, names: &NormNames, width: i64, config: NormConfig) -> Norms {
        let norm = |name: Option<&str>| name.map(|name| Norm::new(&scope.pp(name), width, config));
        Norms { before: norm(names.before), after: norm(names.after), outer: norm(names.outer) }
    }

    /// `outer(x + after(f(before(x))))`.
    pub(super) fn around(&self, x: &Tensor, sub_layer: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let apply = |norm: &Option<Norm>, x: Tensor| norm.as_ref().map_or_else(|| x.shallow_clone(), |n| n.forward(&x));
        let inside = sub_layer(&apply(&self.before, x.shallow_clone()));
        apply(&self.outer, x + apply(&self.after, inside))
    }
}
