//! One layer: shared self-attention, cross-attention of the query rows, and a feed-forward network for each kind of row.

use blip2_torchx::autocast::cast;
use blip2_torchx::params::Scope;
use tch::Tensor;

use super::QFormerConfig;
use super::attention::Projections;
use super::image_keys::PairKeysLayer;
use super::pass::Pass;
use crate::dropout::RowKeys;
use crate::layers::{LayerNorm, Linear};

#[derive(Debug)]
pub struct Layer {
    attention: Projections,
    attention_output: Output,
    cross_attention: Option<(Projections, Output)>,
    query_feed_forward: FeedForward,
    text_feed_forward: Option<FeedForward>,
}

/// `LayerNorm(dropout(dense(x)) + residual)`, which ends every sub-layer of BERT.
#[derive(Debug)]
struct Output {
    dense: Linear,
    layer_norm: LayerNorm,
}

#[derive(Debug)]
struct FeedForward {
    intermediate: Linear,
    output: Output,
}

impl Layer {
    pub fn new(scope: &Scope, c: &QFormerConfig, cross: bool, with_text: bool) -> Layer {
        let (hidden, heads) = (c.hidden_size, c.num_attention_heads);
        Layer {
            attention: Projections::new(&scope.pp("attention.attention"), hidden, hidden, heads),
            attention_output: Output::new(&scope.pp("attention.output"), hidden, c),
            cross_attention: cross.then(|| {
                let scope = scope.pp("crossattention");
                let projections = Projections::new(&scope.pp("attention"), hidden, c.encoder_hidden_size, heads);
                (projections, Output::new(&scope.pp("output"), hidden, c))
            }),
            query_feed_forward: FeedForward::new(scope, "intermediate_query", "output_query", c),
            text_feed_forward: with_text.then(|| FeedForward::new(scope, "intermediate", "output", c)),
        }
    }

    pub fn has_cross_attention(&self) -> bool {
        self.cross_attention.is_some()
    }

    /// The projections whose keys and values [`super::ImageKeys`] computes.
    pub fn cross_projections(&self) -> Option<&Projections> {
        self.cross_attention.as_ref().map(|(projections, _)| projections)
    }

    /// `x [R, hidden] -> [R, hidden]`. In the last layer of a pass over pairs nothing reads text rows: only query rows come back.
    pub fn forward(&self, x: &Tensor, pass: &Pass, keys: Option<&PairKeysLayer>, last: bool) -> Tensor {
        let queries_only = last && pass.reads_queries_only();
        let (query_rows, text_rows) = pass.query_and_text_rows();
        let residual = if queries_only { x.narrow(0, 0, query_rows) } else { x.shallow_clone() };
        let row_keys = if queries_only { pass.query_keys() } else { pass.row_keys() };
        // The stream stays fp32 under autocast, as in the reference; queries, keys and values read one narrow copy of it.
        let attended = self.attention.self_attention(&cast(x), pass, queries_only);
        let x = self.attention_output.forward(&attended, &residual, pass, row_keys);
        if query_rows == 0 {
            return self.text_rows(&x, pass);
        }
        if queries_only || text_rows == 0 {
            return self.query_rows(&x, pass, keys);
        }
        let parts = x.split_with_sizes([query_rows, text_rows], 0);
        Tensor::cat(&[self.query_rows(&parts[0], pass, keys), self.text_rows(&parts[1], pass)], 0)
    }

    fn query_rows(&self, x: &Tensor, pass: &Pass, keys: Option<&PairKeysLayer>) -> Tensor {
        let x = match (&self.cross_attention, keys) {
            (Some((projections, output)), Some(keys)) => {
                output.forward(&projections.cross_attention(x, pass, keys), x, pass, pass.query_keys())
            }
            _ => x.shallow_clone(),
        };
        self.query_feed_forward.forward(&x, pass, pass.query_keys())
    }

    fn text_rows(&self, x: &Tensor, pass: &Pass) -> Tensor {
        let feed_forward =
            self.text_feed_forward.as_ref().expect("a pass with text needs a Q-Former with its text half");
        feed_forward.forward(x, pass, &pass.text_keys())
    }
}

impl Output {
    fn new(scope: &Scope, input: i64, c: &QFormerConfig) -> Output {
        Output {
            dense: Linear::bert(&scope.pp("dense"), input, c.hidden_size),
            layer_norm: LayerNorm::new(&scope.pp("LayerNorm"), c.hidden_size, c.layer_norm_eps),
        }
    }

    fn forward(&self, x: &Tensor, residual: &Tensor, pass: &Pass, keys: &RowKeys) -> Tensor {
        pass.dropout.add_norm(&self.dense.forward(x), residual, &self.layer_norm, keys)
    }
}

impl FeedForward {
    fn new(scope: &Scope, intermediate: &str, output: &str, c: &QFormerConfig) -> FeedForward {
        FeedForward {
            intermediate: Linear::bert(&scope.pp(intermediate).pp("dense"), c.hidden_size, c.intermediate_size),
            output: Output::new(&scope.pp(output), c.intermediate_size, c),
        }
    }

    fn forward(&self, x: &Tensor, pass: &Pass, keys: &RowKeys) -> Tensor {
        let inner = self.intermediate.forward(x).gelu("none");
        self.output.forward(&inner, x, pass, keys)
    }
}
