//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_nn::rotary_emb::rope;
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, rms_norm};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Scores, attend, linear, split_heads};
use crate::language::{KvCache, LanguageModel, State};

/// `text_config`
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_theta")]
    rope_theta: f32,
    rope_scaling: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_theta() -> f32 {
    10_000.0
}

/// The model.
pub struct Llama {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    /// Angle of a step of one position, for each pair of a head's halves.
    frequencies: Vec<f32>,
}

struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    heads: usize,
    groups: usize,
}

/// Rotations of the rows at hand, each `[L, size / 2]`, and the mask between them.
struct Rows {
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
}

impl Llama {
    /// Loads the decoder that `text_config` describes; `vb` is at `language_model`.
    pub fn load(json: &Value, vb: VarBuilder) -> Result<Llama> {
        let c: Config = serde_json::from_value(json.clone()).context("config.json: text_config")?;
        let (heads, groups) = (c.num_attention_heads, c.num_key_value_heads.unwrap_or(c.num_attention_heads));
        if heads == 0 || groups == 0 || !heads.is_multiple_of(groups) {
            bail!("config.json: text_config.num_key_value_heads: expected a divisor of {heads} heads, got {groups}");
        }
        if let Some(scaling) = &c.rope_scaling {
            bail!(
                "config.json: text_config.rope_scaling: expected null, got {scaling}; this example scales no positions"
            );
        }
        if let Some(act) = c.hidden_act.as_deref().filter(|act| *act != "silu") {
            bail!("config.json: text_config.hidden_act: expected silu, got {act}");
        }
        let size = c.head_dim.unwrap_or(c.hidden_size / heads);
        let model = vb.pp("model");
        let embed_tokens = embedding(c.vocab_size, c.hidden_size, model.pp("embed_tokens"))?;
        let lm_head = match c.tie_word_embeddings {
            true => Linear::new(embed_tokens.embeddings().clone(), None),
            false => linear(c.hidden_size, c.vocab_size, vb.pp("lm_head"))?,
        };
        let layer = |i| Layer::load(&c, (heads, groups, size), model.pp("layers").pp(i));
        Ok(Llama {
            embed_tokens,
            layers: (0..c.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: rms_norm(c.hidden_size, c.rms_norm_eps, model.pp("norm"))?,
            lm_head,
            frequencies: (0..size).step_by(2).map(|i| 1.0 / c.rope_theta.powf(i as f32 / size as f32)).collect(),
        })
    }

    /// Rows behind those of `state`; returns the logits behind the last of them.
    fn forward(&self, state: &mut State, embeds: &Tensor) -> Result<Tensor> {
        let rows = self.rows(state.rows()?, embeds.dim(1)?, embeds.device())?;
        let mut x = embeds.clone();
        for (layer, cache) in self.layers.iter().zip(&mut state.layers) {
            x = layer.forward(&x, &rows, cache)?;
        }
        let last = x.narrow(1, x.dim(1)? - 1, 1)?;
        Ok(self.lm_head.forward(&self.norm.forward(&last)?)?.flatten_all()?)
    }

    fn rows(&self, first: usize, count: usize, device: &Device) -> Result<Rows> {
        let positions = (first..first + count).map(|p| p as f32);
        let angles: Vec<f32> = positions.flat_map(|p| self.frequencies.iter().map(move |f| p * f)).collect();
        let angles = Tensor::from_vec(angles, (count, self.frequencies.len()), device)?;
        let sees = |row: usize, column: usize| if column <= first + row { 0.0 } else { f32::NEG_INFINITY };
        let mask: Vec<f32> = (0..count).flat_map(|r| (0..first + count).map(move |c| sees(r, c))).collect();
        Ok(Rows {
            cos: angles.cos()?,
            sin: angles.sin()?,
            // A single row comes last and sees all.
            mask: if count > 1 { Some(Tensor::from_vec(mask, (count, first + count), device)?) } else { None },
        })
    }
}

impl LanguageModel for Llama {
    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, self.embed_tokens.embeddings().device())?;
        Ok(self.embed_tokens.forward(&ids)?.unsqueeze(0)?)
    }

    fn start(&self, prefix: &Tensor) -> Result<(State, Tensor)> {
        let mut state = State::new(self.layers.len());
        let logits = self.forward(&mut state, prefix)?;
        Ok((state, logits))
    }

    fn step(&self, state: &mut State, token: u32) -> Result<Tensor> {
        self.forward(state, &self.embed(&[token])?)
    }
}

impl Layer {
    fn load(c: &Config, (heads, groups, size): (usize, usize, usize), vb: VarBuilder) -> Result<Layer> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let attention = |name, input, output| linear(input, output, vb.pp("self_attn").pp(name));
        let mlp = |name, input, output| linear(input, output, vb.pp("mlp").pp(name));
        let norm = |name| rms_norm(hidden, c.rms_norm_eps, vb.pp(name));
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            q_proj: attention("q_proj", hidden, heads * size)?,
            k_proj: attention("k_proj", hidden, groups * size)?,
            v_proj: attention("v_proj", hidden, groups * size)?,
            o_proj: attention("o_proj", heads * size, hidden)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: mlp("gate_proj", hidden, inner)?,
            up_proj: mlp("up_proj", hidden, inner)?,
            down_proj: mlp("down_proj", inner, hidden)?,
            heads,
            groups,
        })
    }

    fn forward(&self, x: &Tensor, rows: &Rows, cache: &mut KvCache) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(x)?;
        let q = rope(&split_heads(&self.q_proj.forward(&normed)?, self.heads)?, &rows.cos, &rows.sin)?;
        let k = rope(&split_heads(&self.k_proj.forward(&normed)?, self.groups)?, &rows.cos, &rows.sin)?;
        let v = split_heads(&self.v_proj.forward(&normed)?, self.groups)?;
        let (k, v) = cache.extend(k, v)?;
        let repeats = self.heads / self.groups;
        let scores = Scores { bias: rows.mask.as_ref(), ..Scores::plain(q.dim(3)?) };
        let attended = attend(&q, &repeat_heads(&k, repeats)?, &repeat_heads(&v, repeats)?, scores)?;
        let x = (x + self.o_proj.forward(&attended)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let gated = (self.gate_proj.forward(&normed)?.silu()? * self.up_proj.forward(&normed)?)?;
        Ok((&x + self.down_proj.forward(&gated)?)?)
    }
}

/// `[1, groups, L, size] -> [1, groups * repeats, L, size]`, the heads of a group side by side.
fn repeat_heads(x: &Tensor, repeats: usize) -> Result<Tensor> {
    let (batch, groups, rows, size) = x.dims4()?;
    let repeated = x.unsqueeze(2)?.expand((batch, groups, repeats, rows, size))?;
    Ok(repeated.reshape((batch, groups * repeats, rows, size))?)
}
