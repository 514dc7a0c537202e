//! The Q-Former (BLIP-2, section 3.1): learned queries that read an image through cross-attention and share self-attention with text.
//!
//! It is BERT with two feed-forward networks a layer (one for query rows, one for text rows) and cross-attention in every
//! `cross_attention_frequency`-th layer, on query rows only. Text never sees image features directly.
//!
//! Rows travel flat, segment by segment, `[queries of all samples | text of all samples | ..]`, so that every linear layer is one
//! matrix product over exactly the rows it concerns; a [`pass::Pass`] says who attends to whom.

mod attention;
mod image_keys;
mod layer;
pub mod pass;
mod text;

use blip2_torchx::params::{Init, Scope};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use crate::config::{ConfigError, check_sizes, parse};
use crate::dropout::Dropout;
use crate::layers::LayerNorm;
pub use image_keys::{ImageKeys, PairKeys};
use layer::Layer;
use pass::{Pass, Segment};
pub use text::{TextBatch, TextEmbeddings, TextHead};

/// `Blip2QFormerConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // Hugging Face's keys
#[serde(default)]
pub struct QFormerConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub hidden_act: String,
    pub intermediate_size: i64,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
    pub max_position_embeddings: i64,
    pub layer_norm_eps: f64,
    pub cross_attention_frequency: i64,
    pub encoder_hidden_size: i64,
}

impl Default for QFormerConfig {
    /// `bert-base-uncased` behind ViT-g, as the classes of `transformers` have it.
    fn default() -> Self {
        QFormerConfig {
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            hidden_act: "gelu".into(),
            intermediate_size: 3072,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            layer_norm_eps: 1e-12,
            cross_attention_frequency: 2,
            encoder_hidden_size: 1408,
        }
    }
}

impl QFormerConfig {
    /// Reads `qformer_config`, or a BERT's `config.json`.
    ///
    /// # Errors
    /// A mistyped key, a size that cannot be, an activation other than GELU.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        const PART: &str = "qformer_config";
        let c: Self = parse(PART, json)?;
        check_sizes(
            PART,
            &[
                ("vocab_size", c.vocab_size),
                ("hidden_size", c.hidden_size),
                ("num_hidden_layers", c.num_hidden_layers),
                ("num_attention_heads", c.num_attention_heads),
                ("intermediate_size", c.intermediate_size),
                ("max_position_embeddings", c.max_position_embeddings),
                ("cross_attention_frequency", c.cross_attention_frequency),
                ("encoder_hidden_size", c.encoder_hidden_size),
            ],
        )?;
        let unsupported = |key, got, supported| Err(ConfigError::Unsupported { part: PART, key, got, supported });
        if c.hidden_size % c.num_attention_heads != 0 {
            let got = format!("{} for width {}", c.num_attention_heads, c.hidden_size);
            return unsupported("num_attention_heads", got, "a divisor of hidden_size");
        }
        if c.hidden_act != "gelu" {
            return unsupported("hidden_act", c.hidden_act, "gelu");
        }
        Ok(c)
    }

    /// Whether layer `i` has cross-attention.
    pub fn has_cross_attention(&self, i: i64) -> bool {
        i % self.cross_attention_frequency == 0
    }
}

/// The Q-Former with its queries. Its text half exists in stage 1 only.
#[derive(Debug)]
pub struct QFormer {
    /// `[1, queries, hidden]`
    pub query_tokens: Tensor,
    layernorm: LayerNorm,
    layers: Vec<Layer>,
    /// Word and position embeddings (stage 1).
    pub text: Option<TextEmbeddings>,
    config: QFormerConfig,
}

/// Hidden states behind the last layer of the packed pass.
#[derive(Debug)]
pub struct Packed {
    /// `[B, queries, hidden]`
    pub queries: Tensor,
    /// `[CLS]` rows of the uni-modal text, `[B, hidden]`
    pub cls: Tensor,
    /// Rows of the text that begins with `[DEC]`, `[B, T, hidden]`
    pub dec: Tensor,
}

impl QFormer {
    /// Declares all parameters below `root`; `with_text` adds the text half (embeddings and text feed-forward networks).
    pub fn new(root: &Scope, config: &QFormerConfig, queries: i64, with_text: bool) -> QFormer {
        let c = config;
        let scope = root.pp("qformer");
        let text = with_text.then(|| TextEmbeddings::new(&root.pp("embeddings"), c));
        QFormer {
            query_tokens: root.param("query_tokens", &[1, queries, c.hidden_size], Init::Normal(0.02)),
            layernorm: LayerNorm::new(&scope.pp("layernorm"), c.hidden_size, c.layer_norm_eps),
            layers: (0..c.num_hidden_layers)
                .map(|i| Layer::new(&scope.pp("encoder.layer").pp(i), c, c.has_cross_attention(i), with_text))
                .collect(),
            text,
            config: config.clone(),
        }
    }

    /// Its configuration.
    pub fn config(&self) -> &QFormerConfig {
        &self.config
    }

    /// How many queries it has.
    pub fn num_queries(&self) -> i64 {
        self.query_tokens.size()[1]
    }

    /// Keys and values of every cross-attention for a batch of images, computed once and used by every pass.
    ///
    /// # Shapes
    /// `features [B, N, width]`, as the frozen tower gives them.
    pub fn image_keys(&self, features: &Tensor, ln_vision: &LayerNorm) -> ImageKeys {
        ImageKeys::project(features, ln_vision, &self.layers, self.config.num_attention_heads)
    }

    /// Queries alone: stage 2, image embeddings. `-> [B, queries, hidden]`
    pub(crate) fn encode_images(&self, keys: &ImageKeys, dropout: &Dropout) -> Tensor {
        let batch = keys.batch();
        let pass = Pass::queries(batch, self.num_queries(), dropout);
        let x = self.embed(vec![self.query_rows(batch)], &pass);
        let x = self.run(x, &pass, &keys.as_pairs());
        self.as_queries(&x, batch)
    }

    /// Text alone, bidirectional: text embeddings. `-> [CLS]` rows `[B, hidden]`
    pub(crate) fn encode_texts(&self, embeddings: &Tensor, text: &TextBatch, dropout: &Dropout) -> Tensor {
        let (batch, tokens) = (text.batch(), text.tokens());
        let pass = Pass::text(text, dropout);
        let x = self.embed(vec![embeddings.flatten(0, 1)], &pass);
        let x = self.run(x, &pass, &PairKeys::none());
        x.view([batch, tokens, -1]).select(1, 0)
    }

    /// Queries, uni-modal text and generation text in one pass; see [`Pass::packed`] for its mask.
    ///
    /// # Shapes
    /// `cls_text, dec_text [B, T, hidden]`: embeddings before the shared LayerNorm.
    pub(crate) fn encode_packed(
        &self,
        keys: &ImageKeys,
        cls_text: &Tensor,
        dec_text: &Tensor,
        text: &TextBatch,
        dropout: &Dropout,
    ) -> Packed {
        let (batch, tokens, queries) = (text.batch(), text.tokens(), self.num_queries());
        let pass = Pass::packed(queries, text, dropout);
        let rows = vec![self.query_rows(batch), cls_text.flatten(0, 1), dec_text.flatten(0, 1)];
        let x = self.run(self.embed(rows, &pass), &pass, &keys.as_pairs());
        let parts = x.split_with_sizes([batch * queries, batch * tokens, batch * tokens], 0);
        Packed {
            queries: self.as_queries(&parts[0], batch),
            cls: parts[1].view([batch, tokens, -1]).select(1, 0),
            dec: parts[2].view([batch, tokens, -1]),
        }
    }

    /// Queries and text that attend to each other, for image-text pairs (ITM). `-> [P, queries, hidden]`
    ///
    /// # Shapes
    /// `text_embeddings [P, T, hidden]` before the shared LayerNorm; `pairs` covers the same P pairs.
    pub(crate) fn encode_pairs(
        &self,
        pairs: &PairKeys,
        text_embeddings: &Tensor,
        text: &TextBatch,
        dropout: &Dropout,
    ) -> Tensor {
        let batch = text.batch();
        let pass = Pass::pairs(self.num_queries(), text, dropout);
        let x = self.embed(vec![self.query_rows(batch), text_embeddings.flatten(0, 1)], &pass);
        let x = self.run(x, &pass, pairs);
        self.as_queries(&x, batch)
    }

    /// The queries of every sample, flat: `[B * queries, hidden]`.
    fn query_rows(&self, batch: i64) -> Tensor {
        self.query_tokens.expand([batch, -1, -1], false).flatten(0, 1)
    }

    fn as_queries(&self, rows: &Tensor, batch: i64) -> Tensor {
        rows.view([batch, self.num_queries(), -1])
    }

    /// One LayerNorm and dropout over queries and text alike.
    fn embed(&self, rows: Vec<Tensor>, pass: &Pass) -> Tensor {
        let x = if rows.len() == 1 { rows[0].shallow_clone() } else { Tensor::cat(&rows, 0) };
        pass.dropout.apply(&self.layernorm.forward(&x), pass.row_keys())
    }

    fn run(&self, mut x: Tensor, pass: &Pass, pairs: &PairKeys) -> Tensor {
        let last = self.layers.len() - 1;
        let mut cross = 0;
        for (i, layer) in self.layers.iter().enumerate() {
            let keys = if layer.has_cross_attention() { pairs.layer(cross) } else { None };
            cross += usize::from(layer.has_cross_attention());
            x = layer.forward(&x, pass, keys, i == last);
        }
        x
    }
}

impl Segment {
    /// Whether its rows are queries.
    pub(crate) fn is_queries(&self) -> bool {
        matches!(self, Segment::Queries)
    }
}

#[cfg(test)]
mod tests {
    use blip2_torchx::autocast;
    use blip2_torchx::params::ParamStore;
    use tch::{Device, Kind};

    use super::*;

    /// As in the reference, whose LayerNorms answer in fp32.
    #[test]
    fn the_residual_stream_stays_fp32_under_autocast() {
        let config = QFormerConfig {
            vocab_size: 11,
            hidden_size: 16,
            num_hidden_layers: 4,
            num_attention_heads: 2,
            intermediate_size: 24,
            encoder_hidden_size: 12,
            ..QFormerConfig::default()
        };
        let params = ParamStore::trainable(Device::Cpu);
        let qformer = QFormer::new(&params.root(), &config, 3, false);
        let ln_vision = LayerNorm::new(&params.root().pp("ln_vision"), 12, 1e-6);
        let features = Tensor::rand([2, 5, 12], (Kind::Float, Device::Cpu));
        let encode = || qformer.encode_images(&qformer.image_keys(&features, &ln_vision), &Dropout::off());
        let wide = encode();
        let narrow = autocast(Device::Cpu, Some(Kind::BFloat16), encode);
        assert_eq!(narrow.kind(), Kind::Float);
        let error = (&narrow - &wide).abs().max().double_value(&[]);
        assert!(error > 0.0 && error < 0.05, "{error}");
    }
}
