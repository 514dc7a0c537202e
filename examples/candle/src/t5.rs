//! T5, T5 1.1 and FlanT5: an encoder that reads queries and prompt, and a decoder that writes the caption.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, rms_norm};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Scores, attend, linear, split_heads};
use crate::language::{KvCache, LanguageModel, State};

/// `text_config`
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_decoder_layers: Option<usize>,
    num_heads: usize,
    #[serde(default = "default_buckets")]
    relative_attention_num_buckets: usize,
    #[serde(default = "default_distance")]
    relative_attention_max_distance: usize,
    #[serde(default = "default_eps")]
    layer_norm_epsilon: f64,
    #[serde(default = "default_feed_forward")]
    feed_forward_proj: String,
    dense_act_fn: Option<String>,
    #[serde(default = "default_tied")]
    tie_word_embeddings: bool,
    #[serde(default)]
    decoder_start_token_id: u32,
}

fn default_buckets() -> usize {
    32
}

fn default_distance() -> usize {
    128
}

fn default_eps() -> f64 {
    1e-6
}

fn default_feed_forward() -> String {
    "relu".into()
}

fn default_tied() -> bool {
    true
}

/// The model.
pub struct T5 {
    shared: Embedding,
    encoder: Stack,
    decoder: Stack,
    lm_head: Linear,
    /// A tied head reads rows scaled by this.
    head_scale: f64,
    decoder_start: u32,
}

/// Encoder or decoder.
struct Stack {
    blocks: Vec<Block>,
    final_layer_norm: RmsNorm,
    /// `[buckets, heads]`, from the first block; all blocks share it.
    relative_bias: Embedding,
    positions: Positions,
}

/// How distances become buckets.
struct Positions {
    buckets: usize,
    max_distance: usize,
    bidirectional: bool,
}

struct Block {
    attention: Attention,
    /// A decoder's attention to the encoder.
    cross_attention: Option<Attention>,
    feed_forward: FeedForward,
}

struct Attention {
    layer_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
}

struct FeedForward {
    layer_norm: RmsNorm,
    /// Activated; multiplied by `gate` where there is one.
    wi: Linear,
    gate: Option<Linear>,
    wo: Linear,
    activation: Activation,
}

#[derive(Clone, Copy)]
enum Activation {
    Relu,
    Gelu,
    /// The approximation by tanh.
    GeluNew,
}

impl T5 {
    /// Loads the encoder-decoder that `text_config` describes; `vb` is at `language_model`.
    pub fn load(json: &Value, vb: VarBuilder) -> Result<T5> {
        let c: Config = serde_json::from_value(json.clone()).context("config.json: text_config")?;
        if c.relative_attention_num_buckets < 4 || c.relative_attention_max_distance <= c.relative_attention_num_buckets
        {
            bail!(
                "config.json: text_config: expected 4 or more relative_attention_num_buckets and a larger relative_attention_max_distance"
            );
        }
        let shared = embedding(c.vocab_size, c.d_model, vb.pp("shared"))?;
        let tied = c.tie_word_embeddings;
        Ok(T5 {
            encoder: Stack::load(&c, c.num_layers, false, vb.pp("encoder"))?,
            decoder: Stack::load(&c, c.num_decoder_layers.unwrap_or(c.num_layers), true, vb.pp("decoder"))?,
            lm_head: match tied {
                true => Linear::new(shared.embeddings().clone(), None),
                false => linear(c.d_model, c.vocab_size, vb.pp("lm_head"))?,
            },
            head_scale: if tied { (c.d_model as f64).powf(-0.5) } else { 1.0 },
            shared,
            decoder_start: c.decoder_start_token_id,
        })
    }
}

impl LanguageModel for T5 {
    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, self.shared.embeddings().device())?;
        Ok(self.shared.forward(&ids)?.unsqueeze(0)?)
    }

    fn start(&self, prefix: &Tensor) -> Result<(State, Tensor)> {
        let encoded = self.encoder.forward(&mut State::new(self.encoder.blocks.len()), prefix)?;
        let mut state = State::new(self.decoder.blocks.len());
        let crossing = self.decoder.blocks.iter().filter_map(|block| block.cross_attention.as_ref());
        state.encoded = crossing.map(|attention| attention.keys(&encoded)).collect::<Result<_>>()?;
        let logits = self.step(&mut state, self.decoder_start)?;
        Ok((state, logits))
    }

    fn step(&self, state: &mut State, token: u32) -> Result<Tensor> {
        let x = self.decoder.forward(state, &self.embed(&[token])?)?;
        Ok(self.lm_head.forward(&(x * self.head_scale)?)?.flatten_all()?)
    }
}

impl Stack {
    fn load(c: &Config, blocks: usize, decoder: bool, vb: VarBuilder) -> Result<Stack> {
        let bias = vb.pp("block.0.layer.0.SelfAttention.relative_attention_bias");
        Ok(Stack {
            blocks: (0..blocks).map(|i| Block::load(c, decoder, vb.pp("block").pp(i))).collect::<Result<_>>()?,
            final_layer_norm: rms_norm(c.d_model, c.layer_norm_epsilon, vb.pp("final_layer_norm"))?,
            relative_bias: embedding(c.relative_attention_num_buckets, c.num_heads, bias)?,
            positions: Positions {
                buckets: c.relative_attention_num_buckets,
                max_distance: c.relative_attention_max_distance,
                bidirectional: !decoder,
            },
        })
    }

    /// Rows behind those of `state`. An encoder gets all its rows at once, a decoder one at a time, so that no mask is needed.
    fn forward(&self, state: &mut State, embeds: &Tensor) -> Result<Tensor> {
        let bias = self.bias(state.rows()?, embeds.dim(1)?, embeds.device())?;
        let mut x = embeds.clone();
        for (i, (block, cache)) in self.blocks.iter().zip(&mut state.layers).enumerate() {
            x = block.forward(&x, &bias, cache, state.encoded.get(i))?;
        }
        Ok(self.final_layer_norm.forward(&x)?)
    }

    /// `[1, heads, count, first + count]`
    fn bias(&self, first: usize, count: usize, device: &Device) -> Result<Tensor> {
        let all = first + count;
        let bucket = |row: usize, column: usize| self.positions.bucket(column as i64 - row as i64);
        let buckets: Vec<u32> = (first..all).flat_map(|r| (0..all).map(move |c| bucket(r, c))).collect();
        let bias = self.relative_bias.forward(&Tensor::from_vec(buckets, (count, all), device)?)?; // [count, all, heads]
        Ok(bias.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?)
    }
}

impl Positions {
    /// Near distances have a bucket each, far ones share buckets that widen with the logarithm.
    fn bucket(&self, distance: i64) -> u32 {
        let (buckets, offset, distance) = match self.bidirectional {
            true => {
                (self.buckets / 2, if distance > 0 { self.buckets / 2 } else { 0 }, distance.unsigned_abs() as usize)
            }
            false => (self.buckets, 0, (-distance).max(0) as usize),
        };
        let exact = buckets / 2;
        let within = if distance < exact {
            distance
        } else {
            let far = (distance as f32 / exact as f32).ln() / (self.max_distance as f32 / exact as f32).ln();
            (exact + (far * (buckets - exact) as f32) as usize).min(buckets - 1)
        };
        (offset + within) as u32
    }
}

impl Block {
    fn load(c: &Config, decoder: bool, vb: VarBuilder) -> Result<Block> {
        let layer = |i: usize| vb.pp("layer").pp(i);
        Ok(Block {
            attention: Attention::load(c, "SelfAttention", layer(0))?,
            cross_attention: match decoder {
                true => Some(Attention::load(c, "EncDecAttention", layer(1))?),
                false => None,
            },
            feed_forward: FeedForward::load(c, layer(if decoder { 2 } else { 1 }))?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        bias: &Tensor,
        cache: &mut KvCache,
        encoded: Option<&(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        let normed = self.attention.layer_norm.forward(x)?;
        let (k, v) = self.attention.keys(&normed)?;
        let (k, v) = cache.extend(k, v)?;
        let mut x = (x + self.attention.forward(&normed, &k, &v, Some(bias))?)?;
        if let (Some(attention), Some((k, v))) = (&self.cross_attention, encoded) {
            let normed = attention.layer_norm.forward(&x)?;
            x = (&x + attention.forward(&normed, k, v, None)?)?;
        }
        self.feed_forward.forward(&x)
    }
}

impl Attention {
    fn load(c: &Config, name: &str, vb: VarBuilder) -> Result<Attention> {
        let inner = c.num_heads * c.d_kv;
        let part = |part, input, output| linear(input, output, vb.pp(name).pp(part));
        Ok(Attention {
            layer_norm: rms_norm(c.d_model, c.layer_norm_epsilon, vb.pp("layer_norm"))?,
            q: part("q", c.d_model, inner)?,
            k: part("k", c.d_model, inner)?,
            v: part("v", c.d_model, inner)?,
            o: part("o", inner, c.d_model)?,
            heads: c.num_heads,
        })
    }

    fn keys(&self, source: &Tensor) -> Result<(Tensor, Tensor)> {
        let part = |projection: &Linear| Ok::<_, anyhow::Error>(split_heads(&projection.forward(source)?, self.heads)?);
        Ok((part(&self.k)?, part(&self.v)?))
    }

    fn forward(&self, normed: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let q = split_heads(&self.q.forward(normed)?, self.heads)?;
        Ok(self.o.forward(&attend(&q, k, v, Scores { scale: 1.0, bias })?)?)
    }
}

impl FeedForward {
    fn load(c: &Config, vb: VarBuilder) -> Result<FeedForward> {
        let (gated, named) = match c.feed_forward_proj.strip_prefix("gated-") {
            // T5 1.1 writes gated-gelu and means the approximation.
            Some("gelu") => (true, "gelu_new"),
            Some(act) => (true, act),
            None => (false, c.feed_forward_proj.as_str()),
        };
        let activation = match c.dense_act_fn.as_deref().unwrap_or(named) {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            "gelu_new" => Activation::GeluNew,
            other => bail!("config.json: text_config.dense_act_fn: expected relu, gelu or gelu_new, got {other}"),
        };
        let dense = vb.pp("DenseReluDense");
        let part = |name, input, output| linear(input, output, dense.pp(name));
        Ok(FeedForward {
            layer_norm: rms_norm(c.d_model, c.layer_norm_epsilon, vb.pp("layer_norm"))?,
            wi: part(if gated { "wi_0" } else { "wi" }, c.d_model, c.d_ff)?,
            gate: if gated { Some(part("wi_1", c.d_model, c.d_ff)?) } else { None },
            wo: part("wo", c.d_ff, c.d_model)?,
            activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.layer_norm.forward(x)?;
        let inner = self.wi.forward(&normed)?;
        let inner = match self.activation {
            Activation::Relu => inner.relu()?,
            Activation::Gelu => inner.gelu_erf()?,
            Activation::GeluNew => inner.gelu()?,
        };
        let inner = match &self.gate {
            Some(gate) => (inner * gate.forward(&normed)?)?,
            None => inner,
        };
        Ok((x + self.wo.forward(&inner)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_transformers() {
        // transformers 4.57.1, T5Attention._relative_position_bucket with 32 buckets and a distance of 128.
        let distances = [-200, -127, -64, -20, -9, -8, -7, -1, 0, 1, 7, 8, 9, 20, 64, 127, 200];
        let of = |bidirectional| {
            let positions = Positions { buckets: 32, max_distance: 128, bidirectional };
            distances.map(|distance| positions.bucket(distance))
        };
        assert_eq!(of(true), [15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 30, 31, 31]);
        assert_eq!(of(false), [31, 31, 26, 17, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
