//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use blip2_torchx::params::{Init, Scope};
use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::config::{ConfigError, check_sizes, parse};
use crate::layers::{Linear, attend, attend_causally, merge_heads, split_heads};

/// `LlamaConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[allow(missing_docs)] // Hugging Face's keys
pub struct LlamaConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    #[serde(default)]
    pub num_key_value_heads: Option<i64>,
    #[serde(default)]
    pub head_dim: Option<i64>,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    #[serde(default)]
    pub rope_scaling: Option<Value>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub hidden_act: Option<String>,
    #[serde(default)]
    pub bos_token_id: Option<i64>,
    #[serde(default)]
    pub eos_token_id: Option<TokenIds>,
    #[serde(default)]
    pub pad_token_id: Option<i64>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_theta() -> f64 {
    10_000.0
}

/// One token id or several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// One.
    One(i64),
    /// Several, any of which ends a text.
    Several(Vec<i64>),
}

impl TokenIds {
    /// All of them.
    pub fn all(&self) -> Vec<i64> {
        match self {
            TokenIds::One(id) => vec![*id],
            TokenIds::Several(ids) => ids.clone(),
        }
    }
}

impl LlamaConfig {
    /// Reads `text_config` or the model's `config.json`.
    ///
    /// # Errors
    /// A missing key, a size that cannot be, scaled rotary positions, an activation other than SiLU.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        const PART: &str = "text_config";
        let c: Self = parse(PART, json)?;
        let (heads, groups) = (c.num_attention_heads, c.key_value_heads());
        check_sizes(
            PART,
            &[
                ("vocab_size", c.vocab_size),
                ("hidden_size", c.hidden_size),
                ("intermediate_size", c.intermediate_size),
                ("num_hidden_layers", c.num_hidden_layers),
                ("num_attention_heads", heads),
                ("num_key_value_heads", groups),
                ("head_dim", c.head_size()),
            ],
        )?;
        let unsupported = |key, got, supported| Err(ConfigError::Unsupported { part: PART, key, got, supported });
        if heads % groups != 0 {
            return unsupported("num_key_value_heads", groups.to_string(), "a divisor of num_attention_heads");
        }
        if c.head_size() % 2 != 0 {
            return unsupported("head_dim", c.head_size().to_string(), "an even number");
        }
        if let Some(scaling) = c.rope_scaling.as_ref().filter(|s| !s.is_null()) {
            return unsupported("rope_scaling", scaling.to_string(), "null");
        }
        match c.hidden_act.as_deref() {
            None | Some("silu") => Ok(c),
            Some(other) => unsupported("hidden_act", other.into(), "silu"),
        }
    }

    fn key_value_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_size(&self) -> i64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
}

/// The model.
#[derive(Debug)]
pub struct Llama {
    embed_tokens: Tensor,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Option<Tensor>,
    head_size: i64,
    rope_theta: f64,
}

#[derive(Debug)]
struct DecoderLayer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    heads: i64,
    key_value_heads: i64,
}

#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

/// Keys and values of the tokens so far, per layer `[B, key-value heads, L, size]`.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

/// Rotation angles of the rows at hand, `[B or 1, 1, L, size]`, in the model's dtype.
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Llama {
    /// Declares the model: `model.*`, and `lm_head.weight` unless tied.
    pub fn new(scope: &Scope, c: &LlamaConfig) -> Llama {
        let model = scope.pp("model");
        let table = [c.vocab_size, c.hidden_size];
        Llama {
            embed_tokens: model.pp("embed_tokens").param("weight", &table, Init::Normal(0.02)),
            layers: (0..c.num_hidden_layers).map(|i| DecoderLayer::new(&model.pp("layers").pp(i), c)).collect(),
            norm: RmsNorm::new(&model.pp("norm"), c),
            lm_head: (!c.tie_word_embeddings).then(|| scope.pp("lm_head").param("weight", &table, Init::Normal(0.02))),
            head_size: c.head_size(),
            rope_theta: c.rope_theta,
        }
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.embed_tokens.kind()
    }

    /// `ids i64 [.., T] -> [.., T, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, ids, -1, false, false)
    }

    /// `hidden [.., hidden] -> logits [.., vocabulary]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let none: Option<&Tensor> = None;
        hidden.to_kind(self.kind()).linear(self.lm_head.as_ref().unwrap_or(&self.embed_tokens), none)
    }

    /// Right-padded training sequences: `[B, L, hidden] -> [B, L, hidden]`.
    pub fn forward(&self, embeds: &Tensor) -> Tensor {
        let positions = Tensor::arange(embeds.size()[1], (Kind::Int64, embeds.device())).unsqueeze(0);
        let rotary = self.rotary(&positions);
        let mut x = embeds.to_kind(self.kind());
        for layer in &self.layers {
            x = layer.forward(&x, &rotary, None, None);
        }
        self.norm.forward(&x)
    }

    /// Rows behind a cache, left padding allowed: positions count the tokens of `mask bool [B, cached + L]`.
    pub fn forward_cached(&self, embeds: &Tensor, mask: &Tensor, cache: &mut KvCache) -> Tensor {
        let (rows, total) = (embeds.size()[1], mask.size()[1]);
        let positions = (mask.to_kind(Kind::Int64).cumsum(1, Kind::Int64) - 1).clamp_min(0);
        let rotary = self.rotary(&positions.narrow(1, total - rows, rows));
        let causal = Tensor::ones([rows, total], (Kind::Bool, embeds.device())).tril(total - rows);
        // Rows of padding attend to themselves, so that no row of the softmax is empty.
        let own =
            Tensor::eye_m(rows, total, (Kind::Float, embeds.device())).roll([total - rows], [1]).to_kind(Kind::Bool);
        let allowed = mask.unsqueeze(1).unsqueeze(1).logical_and(&causal).logical_or(&own); // [B, 1, L, cached + L]
        let mut x = embeds.to_kind(self.kind());
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &rotary, Some(&allowed), Some((i, &mut *cache)));
        }
        self.norm.forward(&x)
    }

    /// `positions i64 [B or 1, L]`; angles are computed in f32, as the reference does.
    fn rotary(&self, positions: &Tensor) -> Rotary {
        let frequencies = inverse_frequencies(self.head_size, self.rope_theta, positions.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies; // [B, L, size/2]
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1);
        Rotary { cos: angles.cos().to_kind(self.kind()), sin: angles.sin().to_kind(self.kind()) }
    }
}

fn inverse_frequencies(head_size: i64, theta: f64, device: Device) -> Tensor {
    let exponents = Tensor::arange_start_step(0, head_size, 2, (Kind::Float, device)) / head_size as f64;
    Tensor::full([1], theta, (Kind::Float, device)).pow(&exponents).reciprocal()
}

impl DecoderLayer {
    fn new(scope: &Scope, c: &LlamaConfig) -> DecoderLayer {
        let (hidden, inner, size) = (c.hidden_size, c.intermediate_size, c.head_size());
        let (heads, groups) = (c.num_attention_heads, c.key_value_heads());
        let attention =
            |name: &str, input, output| Linear::plain(&scope.pp("self_attn").pp(name), input, output, c.attention_bias);
        let mlp = |name: &str, input, output| Linear::plain(&scope.pp("mlp").pp(name), input, output, c.mlp_bias);
        DecoderLayer {
            input_layernorm: RmsNorm::new(&scope.pp("input_layernorm"), c),
            q_proj: attention("q_proj", hidden, heads * size),
            k_proj: attention("k_proj", hidden, groups * size),
            v_proj: attention("v_proj", hidden, groups * size),
            o_proj: attention("o_proj", heads * size, hidden),
            post_attention_layernorm: RmsNorm::new(&scope.pp("post_attention_layernorm"), c),
            gate_proj: mlp("gate_proj", hidden, inner),
            up_proj: mlp("up_proj", hidden, inner),
            down_proj: mlp("down_proj", inner, hidden),
            heads,
            key_value_heads: groups,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        mask: Option<&Tensor>,
        cache: Option<(usize, &mut KvCache)>,
    ) -> Tensor {
        let normed = self.input_layernorm.forward(x);
        let q = rotary.apply(&split_heads(&self.q_proj.forward(&normed), self.heads));
        let mut k = rotary.apply(&split_heads(&self.k_proj.forward(&normed), self.key_value_heads));
        let mut v = split_heads(&self.v_proj.forward(&normed), self.key_value_heads);
        if let Some((layer, cache)) = cache {
            (k, v) = cache.extend(layer, k, v);
        }
        let repeats = self.heads / self.key_value_heads;
        let (k, v) = (repeat_heads(&k, repeats), repeat_heads(&v, repeats));
        let attended = match mask {
            Some(mask) => attend(&q, &k, &v, Some(mask)),
            None => attend_causally(&q, &k, &v),
        };
        let x = x + self.o_proj.forward(&merge_heads(&attended));
        let normed = self.post_attention_layernorm.forward(&x);
        let gated = self.gate_proj.forward(&normed).silu() * self.up_proj.forward(&normed);
        x + self.down_proj.forward(&gated)
    }
}

impl RmsNorm {
    fn new(scope: &Scope, c: &LlamaConfig) -> RmsNorm {
        RmsNorm { weight: scope.param("weight", &[c.hidden_size], Init::Ones), eps: c.rms_norm_eps }
    }

    /// Statistics in f32, the product with the weight in the dtype of `x`.
    fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let variance = (&wide * &wide).mean_dim([-1i64].as_slice(), true, Kind::Float);
        (wide * (variance + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

impl Rotary {
    /// Rotates the two halves of each head: `x cos + (-x2, x1) sin`.
    fn apply(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * &self.cos + rotated * &self.sin
    }
}

impl KvCache {
    /// Appends the rows of a layer and returns all of its keys and values.
    fn extend(&mut self, layer: usize, k: Tensor, v: Tensor) -> (Tensor, Tensor) {
        let (k, v) = match self.layers.get(layer) {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 2), Tensor::cat(&[old_v, &v], 2)),
            None => (k, v),
        };
        let kept = (k.shallow_clone(), v.shallow_clone());
        if layer < self.layers.len() {
            self.layers[layer] = kept
        } else {
            self.layers.push(kept)
        }
        (k, v)
    }

    /// Reorders (or repeats) the sequences, as beam search does.
    pub fn select(&mut self, rows: &Tensor) {
        for (k, v) in &mut self.layers {
            *k = k.index_select(0, rows);
            *v = v.index_select(0, rows);
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
