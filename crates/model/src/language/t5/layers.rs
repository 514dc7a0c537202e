//! The layers of T5's blocks: RMSNorm without a mean, attention without a scale, the feed-forward layer.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::T5Config;
use crate::activation::Activation;
use crate::dropout::{Dropout, RowKeys};
use crate::layers::{Linear, merge_heads, root_mean_square, split_heads};

/// Keys and values, `[B, heads, rows, size]` each.
#[derive(Debug)]
pub(super) struct KeyValues {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

impl KeyValues {
    /// These rows, then those.
    pub(super) fn followed_by(&self, later: &KeyValues) -> KeyValues {
        KeyValues {
            keys: Tensor::cat(&[&self.keys, &later.keys], 2),
            values: Tensor::cat(&[&self.values, &later.values], 2),
        }
    }

    /// The sequences at these indices.
    pub(super) fn select(&self, rows: &Tensor) -> KeyValues {
        KeyValues { keys: self.keys.index_select(0, rows), values: self.values.index_select(0, rows) }
    }
}

/// Where a pass through a stack drops, and what its masks are keyed by.
pub(super) struct Drops<'a> {
    dropout: &'a Dropout,
    keys: RowKeys,
}

impl<'a> Drops<'a> {
    /// For sequences of `rows` tokens.
    pub(super) fn new(dropout: &'a Dropout, rows: i64) -> Drops<'a> {
        Drops { dropout, keys: dropout.token_keys(0, rows) }
    }

    /// `x [B, rows, ..]`.
    pub(super) fn apply(&self, x: &Tensor) -> Tensor {
        self.dropout.apply_tokens(x, &self.keys)
    }
}

#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub(super) fn new(scope: &Scope, c: &T5Config) -> RmsNorm {
        RmsNorm { weight: scope.param("weight", &[c.d_model], Init::Ones), eps: c.layer_norm_epsilon }
    }

    /// Statistics in f32; the result has the weight's dtype whatever the residual stream has.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        root_mean_square(x, self.eps).to_kind(self.weight.kind()) * &self.weight
    }
}

/// Attention with its norm in front and the residual around it.
#[derive(Debug)]
pub(super) struct AttentionLayer {
    layer_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: i64,
}

impl AttentionLayer {
    /// Declares `layer_norm` and, below `name`, the four projections.
    pub(super) fn new(scope: &Scope, name: &str, c: &T5Config) -> AttentionLayer {
        let below = scope.pp(name);
        let inner = c.num_heads * c.d_kv;
        AttentionLayer {
            layer_norm: RmsNorm::new(&scope.pp("layer_norm"), c),
            q: Linear::plain(&below.pp("q"), c.d_model, inner, false),
            k: Linear::plain(&below.pp("k"), c.d_model, inner, false),
            v: Linear::plain(&below.pp("v"), c.d_model, inner, false),
            o: Linear::plain(&below.pp("o"), inner, c.d_model, false),
            heads: c.num_heads,
        }
    }

    /// `x [B, rows, d_model]`, normalised as [`AttentionLayer::attend`] expects its input.
    pub(super) fn norm(&self, x: &Tensor) -> Tensor {
        self.layer_norm.forward(x)
    }

    /// What rows offer to be attended to.
    pub(super) fn key_values(&self, rows: &Tensor) -> KeyValues {
        KeyValues {
            keys: split_heads(&self.k.forward(rows), self.heads),
            values: split_heads(&self.v.forward(rows), self.heads),
        }
    }

    /// `x + dropout(attention of the normalised rows)`; `bias` is added to the scores and broadcasts to `[B, heads, rows, keys]`.
    pub(super) fn attend(&self, x: &Tensor, normed: &Tensor, to: &KeyValues, bias: &Tensor, drops: &Drops) -> Tensor {
        let q = split_heads(&self.q.forward(normed), self.heads);
        let attended = attend(&q, to, bias, drops);
        without_overflow(x + drops.apply(&self.o.forward(&merge_heads(&attended))))
    }
}

/// `dropout(softmax(q k^T + bias)) v`: the scale that other models divide by is in T5's weights.
fn attend(q: &Tensor, to: &KeyValues, bias: &Tensor, drops: &Drops) -> Tensor {
    if drops.dropout.is_off() {
        return Tensor::scaled_dot_product_attention(q, &to.keys, &to.values, Some(bias), 0.0, false, 1.0, false);
    }
    let scores = q.matmul(&to.keys.transpose(2, 3)) + bias;
    let weights = scores.softmax(-1, Kind::Float).to_kind(q.kind());
    // Row by row of the text: so a mask does not depend on how long the others of the batch are.
    drops.apply(&weights.transpose(1, 2)).transpose(1, 2).matmul(&to.values)
}

/// The feed-forward layer with its norm in front and the residual around it.
#[derive(Debug)]
pub(super) struct FeedForward {
    layer_norm: RmsNorm,
    /// `wi`, or `wi_0` where `wi_1` stands beside it.
    wi: Linear,
    wi_1: Option<Linear>,
    wo: Linear,
    activation: Activation,
}

impl FeedForward {
    pub(super) fn new(scope: &Scope, c: &T5Config) -> FeedForward {
        let below = scope.pp("DenseReluDense");
        let wide = |name: &str| Linear::plain(&below.pp(name), c.d_model, c.d_ff, false);
        // The one product that leaves fp16's range: kept in fp32 there, and with it the residual stream behind it.
        let half = scope.kind() == Kind::Half;
        let narrow = if half { below.in_kind(Kind::Float) } else { below.clone() };
        FeedForward {
            layer_norm: RmsNorm::new(&scope.pp("layer_norm"), c),
            wi: wide(if c.is_gated() { "wi_0" } else { "wi" }),
            wi_1: c.is_gated().then(|| wide("wi_1")),
            wo: Linear::plain(&narrow.pp("wo"), c.d_ff, c.d_model, false),
            activation: c.activation(),
        }
    }

    /// `x [B, rows, d_model]`.
    pub(super) fn forward(&self, x: &Tensor, drops: &Drops) -> Tensor {
        let normed = self.layer_norm.forward(x);
        let inner = self.activation.apply(&self.wi.forward(&normed));
        let inner = match &self.wi_1 {
            Some(wi_1) => inner * wi_1.forward(&normed),
            None => inner,
        };
        let inner = drops.apply(&inner).to_kind(self.wo.weight.kind());
        without_overflow(x + drops.apply(&self.wo.forward(&inner)))
    }
}

/// In fp16 what is infinite becomes large, as in the reference.
fn without_overflow(x: Tensor) -> Tensor {
    const LARGEST: f64 = 65_504.0;
    if x.kind() != Kind::Half {
        return x;
    }
    let limit = LARGEST - x.isinf().any().to_kind(Kind::Half) * 1000.0;
    x.clamp_tensor(Some(&(-&limit)), Some(&limit))
}
