//! One decoder for every family: a few parts, of which a configuration chooses.
//!
//! | part | choices |
//! |---|---|
//! | [`config::Names`] | Hugging Face's names, and with them the norms and projections that exist |
//! | [`config::Positions`] | rotary tables with their scaling, or learned rows |
//! | [`config::AttentionConfig`], [`config::LayerConfig`] | grouped queries, biases, capped scores; a layer's window, rotary table and scale |
//! | [`config::MlpConfig`] | gated or plain, four activations |
//! | [`config::NormConfig`] | LayerNorm, RMS, RMS by `1 + weight`; before, behind or around a sub-layer |
//!
//! `families` reads each family's `config.json` into such a choice.

mod attention;
mod cache;
pub mod config;
mod families;
mod keys;
mod mlp;
mod norm;
mod pass;
mod positions;
mod projection;
mod rope_parameters;
#[cfg(test)]
mod rope_parity;
pub mod rope_scaling;

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use self::attention::Attention;
pub use self::cache::KvCache;
use self::config::EmbeddingScale;
pub use self::config::{CaptionFrame, DecoderConfig};
use self::mlp::Mlp;
use self::norm::{Norm, Norms};
use self::pass::Pass;
use self::positions::{LearnedPositions, Rotary};
use self::projection::Projection;
use crate::dropout::Dropout;

/// A decoder-only language model.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embeddings: Tensor,
    /// Into and out of the residual stream, where embeddings have another width.
    projections: Option<(Projection, Projection)>,
    learned: Option<LearnedPositions>,
    rotary: Vec<Rotary>,
    layers: Vec<Layer>,
    norm: Option<Norm>,
    head: Option<Tensor>,
}

#[derive(Debug)]
struct Layer {
    attention: Attention,
    attention_norms: Norms,
    mlp: Mlp,
    mlp_norms: Norms,
}

impl Decoder {
    /// Declares the model below `scope`, and `lm_head.weight` unless tied.
    pub fn new(scope: &Scope, c: &DecoderConfig) -> Decoder {
        let (base, names) = (scope.pp(c.names.base), &c.names);
        let table = [c.vocab_size, c.embedding_width];
        let projected = c.embedding_width != c.width;
        let project = |name: &str, input, output| Projection::new(&base.pp(name), input, output, false, false);
        let (learned, rotary) = match &c.positions {
            config::Positions::Learned { count, offset } => {
                (Some(LearnedPositions::new(&base, c, *count, *offset)), Vec::new())
            }
            config::Positions::Rotary(tables) => {
                (None, tables.iter().map(|table| Rotary::new(table, scope.device())).collect())
            }
        };
        let layers = base.pp(names.layers);
        Decoder {
            embeddings: base.pp(names.embeddings).param("weight", &table, Init::Normal(0.02)),
            projections: projected.then(|| {
                let (outer, inner) = (c.embedding_width, c.width);
                (project("project_in", outer, inner), project("project_out", inner, outer))
            }),
            learned,
            rotary,
            layers: (0..c.layers.len()).map(|i| Layer::new(&layers.pp(i), c, i)).collect(),
            norm: c.final_norm.then(|| Norm::new(&base.pp(names.final_norm), c.width, c.norm)),
            head: (!c.tied_head).then(|| scope.pp("lm_head").param("weight", &table, Init::Normal(0.02))),
            config: c.clone(),
        }
    }

    /// The dtype it computes in: that of its weights.
    pub fn kind(&self) -> Kind {
        self.embeddings.kind()
    }

    /// The longest sequence that its positions allow, where they end.
    pub fn max_positions(&self) -> Option<i64> {
        self.config.max_positions()
    }

    /// `ids i64 [.., T] -> [.., T, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        let embedded = Tensor::embedding(&self.embeddings, ids, -1, false, false);
        match self.config.embedding_scale {
            EmbeddingScale::Lookup(scale) => self.scaled(&embedded, scale),
            EmbeddingScale::None | EmbeddingScale::Input(_) => embedded,
        }
    }

    /// `hidden [.., hidden] -> logits [.., vocabulary]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let none: Option<&Tensor> = None;
        let logits = hidden.to_kind(self.kind()).linear(self.head.as_ref().unwrap_or(&self.embeddings), none);
        match self.config.final_logit_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Right-padded training sequences: `[B, L, hidden] -> [B, L, hidden]`.
    ///
    /// `dropout` drops embeddings, attention and residuals where `transformers` does in training.
    pub fn forward(&self, embeds: &Tensor, dropout: &Dropout) -> Tensor {
        let (batch, rows, _) = embeds.size3().expect("rank 3: [batch, rows, width]");
        let positions = Tensor::arange(rows, (Kind::Int64, embeds.device())).unsqueeze(0);
        let pass = Pass::whole(&self.config, &self.rotary, &positions, self.kind(), dropout, batch);
        self.run(embeds, &positions, &pass, None)
    }

    /// Rows behind a cache, left padding allowed: positions count the tokens of `mask bool [B, cached + L]`.
    pub fn forward_cached(&self, embeds: &Tensor, mask: &Tensor, cache: &mut KvCache) -> Tensor {
        let (rows, total) = (embeds.size()[1], mask.size()[1]);
        let positions = (mask.to_kind(Kind::Int64).cumsum(1, Kind::Int64) - 1).clamp_min(0);
        let positions = positions.narrow(1, total - rows, rows);
        let dropout = Dropout::off();
        let pass = Pass::behind_cache(&self.config, &self.rotary, &positions, self.kind(), mask, &dropout);
        self.run(embeds, &positions, &pass, Some(cache))
    }

    fn run(&self, embeds: &Tensor, positions: &Tensor, pass: &Pass, mut cache: Option<&mut KvCache>) -> Tensor {
        let mut x = embeds.to_kind(self.kind());
        if let EmbeddingScale::Input(scale) = self.config.embedding_scale {
            x = self.scaled(&x, scale);
        }
        if let Some((project_in, _)) = &self.projections {
            x = project_in.forward(&x);
        }
        if let Some(learned) = &self.learned {
            x = &x + learned.at(positions);
        }
        x = pass.dropout.apply_embedding(&x, &pass.keys);
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, pass, cache.as_deref_mut().map(|cache| (i, cache)));
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(&x);
        }
        match &self.projections {
            Some((_, project_out)) => project_out.forward(&x),
            None => x,
        }
    }

    /// The factor is rounded to the dtype of `x` first, as Gemma was trained.
    fn scaled(&self, x: &Tensor, scale: f64) -> Tensor {
        x * Tensor::from(scale).to_kind(x.kind())
    }
}

impl Layer {
    fn new(scope: &Scope, c: &DecoderConfig, index: usize) -> Layer {
        let norms = |names| Norms::new(scope, names, c.width, c.norm);
        Layer {
            attention: Attention::new(scope, c, c.layers[index]),
            attention_norms: norms(&c.names.attention_norms),
            mlp: Mlp::new(scope, c),
            mlp_norms: norms(&c.names.mlp_norms),
        }
    }

    fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<(usize, &mut KvCache)>) -> Tensor {
        let dropped = |x: Tensor| pass.dropout.apply(&x, &pass.keys);
        let x = self.attention_norms.around(x, |x| dropped(self.attention.forward(x, pass, cache)));
        self.mlp_norms.around(&x, |x| dropped(self.mlp.forward(x)))
    }
}
