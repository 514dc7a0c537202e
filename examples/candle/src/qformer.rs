//! The Q-Former's query half: learned queries that attend to each other and, in every `cross_attention_frequency`-th layer, to the image.

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, layer_norm};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Scores, attend, linear, split_heads};

/// `qformer_config`, with `transformers`' default for a key that is left out.
#[derive(Deserialize)]
#[serde(default)]
struct Config {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    layer_norm_eps: f64,
    cross_attention_frequency: usize,
    encoder_hidden_size: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            layer_norm_eps: 1e-12,
            cross_attention_frequency: 2,
            encoder_hidden_size: 1408,
        }
    }
}

/// The queries and their layers.
pub struct QFormer {
    query_tokens: Tensor,
    layernorm: LayerNorm,
    layers: Vec<Layer>,
    /// Width of its output.
    pub hidden_size: usize,
}

struct Layer {
    attention: Attention,
    cross_attention: Option<Attention>,
    intermediate: Linear,
    output: Output,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Output,
    heads: usize,
}

/// `LayerNorm(dense(x) + residual)`, which ends every part of a BERT layer.
struct Output {
    dense: Linear,
    layer_norm: LayerNorm,
}

impl QFormer {
    /// Loads the queries and layers that `config.json` describes; `vb` is at the root.
    pub fn load(config_json: &Value, vb: VarBuilder) -> Result<QFormer> {
        let json = &config_json["qformer_config"];
        let c: Config = serde_json::from_value(json.clone()).context("config.json: qformer_config")?;
        if c.num_attention_heads == 0
            || !c.hidden_size.is_multiple_of(c.num_attention_heads)
            || c.cross_attention_frequency == 0
        {
            bail!(
                "config.json: qformer_config: expected num_attention_heads that divide hidden_size, and a cross_attention_frequency above 0"
            );
        }
        let queries = config_json["num_query_tokens"].as_u64().unwrap_or(32) as usize;
        let layers = vb.pp("qformer.encoder.layer");
        Ok(QFormer {
            query_tokens: vb.get((1, queries, c.hidden_size), "query_tokens")?,
            layernorm: layer_norm(c.hidden_size, c.layer_norm_eps, vb.pp("qformer.layernorm"))?,
            layers: (0..c.num_hidden_layers).map(|i| Layer::load(&c, i, layers.pp(i))).collect::<Result<_>>()?,
            hidden_size: c.hidden_size,
        })
    }

    /// What the queries read from an image: `features [1, N, width] -> [1, queries, hidden]`.
    pub fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let mut x = self.layernorm.forward(&self.query_tokens)?;
        for layer in &self.layers {
            x = layer.forward(&x, features)?;
        }
        Ok(x)
    }
}

impl Layer {
    fn load(c: &Config, index: usize, vb: VarBuilder) -> Result<Layer> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let crosses = index.is_multiple_of(c.cross_attention_frequency);
        Ok(Layer {
            attention: Attention::load(c, hidden, vb.pp("attention"))?,
            cross_attention: match crosses {
                true => Some(Attention::load(c, c.encoder_hidden_size, vb.pp("crossattention"))?),
                false => None,
            },
            intermediate: linear(hidden, inner, vb.pp("intermediate_query.dense"))?,
            output: Output::load(c, inner, vb.pp("output_query"))?,
        })
    }

    fn forward(&self, x: &Tensor, features: &Tensor) -> Result<Tensor> {
        let mut x = self.attention.forward(x, x)?;
        if let Some(attention) = &self.cross_attention {
            x = attention.forward(&x, features)?;
        }
        self.output.forward(&self.intermediate.forward(&x)?.gelu_erf()?, &x)
    }
}

impl Attention {
    fn load(c: &Config, source: usize, vb: VarBuilder) -> Result<Attention> {
        let part = |name, input| linear(input, c.hidden_size, vb.pp("attention").pp(name));
        Ok(Attention {
            query: part("query", c.hidden_size)?,
            key: part("key", source)?,
            value: part("value", source)?,
            output: Output::load(c, c.hidden_size, vb.pp("output"))?,
            heads: c.num_attention_heads,
        })
    }

    /// The rows of `x` read those of `source`.
    fn forward(&self, x: &Tensor, source: &Tensor) -> Result<Tensor> {
        let q = split_heads(&self.query.forward(x)?, self.heads)?;
        let k = split_heads(&self.key.forward(source)?, self.heads)?;
        let v = split_heads(&self.value.forward(source)?, self.heads)?;
        self.output.forward(&attend(&q, &k, &v, Scores::plain(q.dim(3)?))?, x)
    }
}

impl Output {
    fn load(c: &Config, input: usize, vb: VarBuilder) -> Result<Output> {
        Ok(Output {
            dense: linear(input, c.hidden_size, vb.pp("dense"))?,
            layer_norm: layer_norm(c.hidden_size, c.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        Ok(self.layer_norm.forward(&(self.dense.forward(x)? + residual)?)?)
    }
}
