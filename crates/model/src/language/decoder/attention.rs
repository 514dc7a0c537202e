//! Self-attention of decoders: grouped queries, fused or separate projections, norms a head, windows and capped scores.

use blip2_torchx::params::Scope;
use tch::{Kind, Tensor};

use super::KvCache;
use super::config::{AttentionConfig, DecoderConfig, LayerConfig};
use super::norm::Norm;
use super::pass::Pass;
use super::projection::{Projection, Projections};
use crate::layers::{attend_causally, merge_heads, split_heads};

#[derive(Debug)]
pub(super) struct Attention {
    qkv: Projections,
    qk_norms: Option<(Norm, Norm)>,
    output: Projection,
    config: AttentionConfig,
    layer: LayerConfig,
}

impl Attention {
    /// Declares the attention below a layer's `scope`.
    pub(super) fn new(scope: &Scope, c: &DecoderConfig, layer: LayerConfig) -> Attention {
        let (a, names) = (c.attention, &c.names);
        let (queries, keys) = (a.heads * a.head_size, a.key_value_heads * a.head_size);
        let norm = |name: &str| Norm::new(&scope.pp(name), a.head_size, c.norm);
        Attention {
            qkv: Projections::new(scope, names.qkv, c.width, &[queries, keys, keys], a.qkv_bias, names.input_major),
            qk_norms: names.qk_norms.map(|[q, k]| (norm(q), norm(k))),
            output: Projection::new(&scope.pp(names.output), queries, c.width, a.output_bias, names.input_major),
            config: a,
            layer,
        }
    }

    /// `x [B, L, width] -> [B, L, width]`; with a cache, whose layer `cache.0` this is, behind the rows that it holds.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<(usize, &mut KvCache)>) -> Tensor {
        let (heads, groups) = (self.config.heads, self.config.key_value_heads);
        let projected = self.qkv.forward(x);
        let (mut q, mut k) = (split_heads(&projected[0], heads), split_heads(&projected[1], groups));
        let mut v = split_heads(&projected[2], groups);
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
        }
        if let Some(rotation) = pass.rotation(&self.layer) {
            (q, k) = (rotation.apply(&q), rotation.apply(&k));
        }
        if let Some((layer, cache)) = cache {
            (k, v) = cache.extend(layer, k, v);
        }
        let (k, v) = (repeat_heads(&k, heads / groups), repeat_heads(&v, heads / groups));
        self.output.forward(&merge_heads(&self.attend(&q, &k, &v, pass)))
    }

    /// `q [B, H, L, D]`, `k, v [B, H, cached + L, D] -> [B, H, L, D]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass) -> Tensor {
        let mask = pass.mask(&self.layer);
        if let (Some(cap), Some(mask)) = (self.config.logit_cap, mask) {
            let scores = q.matmul(&k.transpose(-2, -1)) * self.layer.scale;
            let scores = (scores / cap).tanh() * cap;
            let scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
            let probabilities = scores.softmax(-1, Kind::Float).to_kind(q.kind());
            return pass.dropout.apply_attention(&probabilities, &pass.keys).matmul(v);
        }
        // The kernels scale by 1/sqrt(D) themselves.
        let beyond = self.layer.scale * (self.config.head_size as f64).sqrt();
        let scaled = if (beyond - 1.0).abs() < 1e-12 { q.shallow_clone() } else { q * beyond };
        match mask {
            Some(mask) => pass.dropout.attend(&scaled, k, v, Some(mask), &pass.keys),
            None => attend_causally(&scaled, k, v),
        }
    }
}

/// `[B, groups, L, size] -> [B, groups * repeats, L, size]`, each group's heads side by side.
fn repeat_heads(x: &Tensor, repeats: i64) -> Tensor {
    if repeats == 1 {
        return x.shallow_clone();
    }
    let (batch, groups, rows, size) = x.size4().expect("rank 4: [batch, heads, rows, size]");
    x.unsqueeze(2).expand([batch, groups, repeats, rows, size], false).reshape([batch, groups * repeats, rows, size])
}
