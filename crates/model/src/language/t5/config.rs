//! `T5Config`: T5, T5 1.1 and FlanT5.

use serde::Deserialize;
use serde_json::Value;

use crate::activation::Activation;
use crate::config::{ConfigError, check_sizes, parse};

const PART: &str = "text_config";

/// `T5Config` with Hugging Face's keys; what a file leaves out has the default of `transformers`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[allow(missing_docs)] // Hugging Face's keys
pub struct T5Config {
    #[serde(default = "default_vocab_size")]
    pub vocab_size: i64,
    #[serde(default = "default_d_model")]
    pub d_model: i64,
    #[serde(default = "default_d_kv")]
    pub d_kv: i64,
    #[serde(default = "default_d_ff")]
    pub d_ff: i64,
    #[serde(default = "default_layers")]
    pub num_layers: i64,
    #[serde(default)]
    pub num_decoder_layers: Option<i64>,
    #[serde(default = "default_heads")]
    pub num_heads: i64,
    #[serde(default = "default_buckets")]
    pub relative_attention_num_buckets: i64,
    #[serde(default = "default_max_distance")]
    pub relative_attention_max_distance: i64,
    #[serde(default = "default_dropout")]
    pub dropout_rate: f64,
    #[serde(default = "default_eps")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "default_projection")]
    feed_forward_proj: String,
    #[serde(default)]
    dense_act_fn: Option<String>,
    #[serde(default)]
    is_gated_act: Option<bool>,
    #[serde(default = "default_tied")]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    scale_decoder_outputs: Option<bool>,
    #[serde(default)]
    pub pad_token_id: i64,
    #[serde(default = "default_eos")]
    pub eos_token_id: i64,
    pub decoder_start_token_id: i64,
}

fn default_vocab_size() -> i64 {
    32_128
}

fn default_d_model() -> i64 {
    512
}

fn default_d_kv() -> i64 {
    64
}

fn default_d_ff() -> i64 {
    2048
}

fn default_layers() -> i64 {
    6
}

fn default_heads() -> i64 {
    8
}

fn default_buckets() -> i64 {
    32
}

fn default_max_distance() -> i64 {
    128
}

fn default_dropout() -> f64 {
    0.1
}

fn default_eps() -> f64 {
    1e-6
}

fn default_projection() -> String {
    "relu".into()
}

fn default_tied() -> bool {
    true
}

fn default_eos() -> i64 {
    1
}

impl T5Config {
    /// Reads `text_config` or the model's `config.json`.
    ///
    /// # Errors
    /// A missing key, a size that cannot be, token ids outside the vocabulary, a feed-forward layer that no code of ours computes.
    pub fn from_json(json: &Value) -> Result<T5Config, ConfigError> {
        let c: T5Config = parse(PART, json)?;
        check_sizes(
            PART,
            &[
                ("vocab_size", c.vocab_size),
                ("d_model", c.d_model),
                ("d_kv", c.d_kv),
                ("d_ff", c.d_ff),
                ("num_layers", c.num_layers),
                ("num_decoder_layers", c.decoder_layers()),
                ("num_heads", c.num_heads),
                ("relative_attention_num_buckets", c.relative_attention_num_buckets),
                ("relative_attention_max_distance", c.relative_attention_max_distance),
            ],
        )?;
        let unsupported =
            |key, got: String, supported| Err(ConfigError::Unsupported { part: PART, key, got, supported });
        // A quarter of the buckets is the range of exact distances; the others grow from there to the maximum.
        let buckets = c.relative_attention_num_buckets;
        if buckets % 4 != 0 {
            return unsupported("relative_attention_num_buckets", buckets.to_string(), "a multiple of 4");
        }
        if c.relative_attention_max_distance <= buckets / 2 {
            let got = c.relative_attention_max_distance.to_string();
            return unsupported("relative_attention_max_distance", got, "more than half of the buckets");
        }
        if !(0.0..1.0).contains(&c.dropout_rate) {
            return unsupported("dropout_rate", c.dropout_rate.to_string(), "0 to below 1");
        }
        for (key, id) in [
            ("pad_token_id", c.pad_token_id),
            ("eos_token_id", c.eos_token_id),
            ("decoder_start_token_id", c.decoder_start_token_id),
        ] {
            if !(0..c.vocab_size).contains(&id) {
                return unsupported(key, id.to_string(), "an id below vocab_size");
            }
        }
        match c.named_activation().0 {
            "relu" | "gelu" | "gelu_new" | "gelu_pytorch_tanh" | "silu" => Ok(c),
            other => unsupported("feed_forward_proj", other.into(), "relu, gelu, gelu_new, silu, each also gated-"),
        }
    }

    /// How many blocks the decoder has: as many as the encoder unless told otherwise.
    pub fn decoder_layers(&self) -> i64 {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    /// Whether the decoder's output is divided by the root of its width before the head. `transformers` 4 does so where the head is tied;
    /// version 5 has a key for it, since it calls every head tied.
    pub fn scales_output(&self) -> bool {
        self.scale_decoder_outputs.unwrap_or(self.tie_word_embeddings)
    }

    /// The feed-forward layer's function.
    pub fn activation(&self) -> Activation {
        match self.named_activation().0 {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            "silu" => Activation::Silu,
            _ => Activation::GeluTanh,
        }
    }

    /// Whether a second projection gates the feed-forward layer.
    pub fn is_gated(&self) -> bool {
        self.named_activation().1
    }

    /// As `transformers` reads it: `dense_act_fn` and `is_gated_act` where they stand, else what `feed_forward_proj` says, whose
    /// `gated-gelu` means `gelu_new`.
    fn named_activation(&self) -> (&str, bool) {
        let (name, gated) = match self.feed_forward_proj.strip_prefix("gated-") {
            Some("gelu") => ("gelu_new", true),
            Some(name) => (name, true),
            None => (self.feed_forward_proj.as_str(), false),
        };
        (self.dense_act_fn.as_deref().unwrap_or(name), self.is_gated_act.unwrap_or(gated))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn small() -> Value {
        json!({
            "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        })
    }

    fn with(key: &str, value: Value) -> Result<T5Config, String> {
        let mut json = small();
        json[key] = value;
        T5Config::from_json(&json).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_file_leaves_out_is_the_first_t5() {
        let c = T5Config::from_json(&small()).unwrap();
        assert_eq!((c.activation(), c.is_gated(), c.tie_word_embeddings), (Activation::Relu, false, true));
        assert_eq!((c.decoder_layers(), c.pad_token_id, c.eos_token_id, c.dropout_rate), (2, 0, 1, 0.1));
    }

    #[test]
    fn sizes_that_a_file_leaves_out_are_those_of_t5_small() {
        let c = T5Config::from_json(&json!({"decoder_start_token_id": 0})).unwrap();
        assert_eq!((c.vocab_size, c.d_model, c.d_kv, c.d_ff), (32_128, 512, 64, 2048));
        assert_eq!((c.num_layers, c.decoder_layers(), c.num_heads), (6, 6, 8));
    }

    #[test]
    fn the_output_is_scaled_before_a_tied_head_unless_the_file_says_otherwise() {
        for (tied, key, scaled) in [
            (true, Value::Null, true),
            (false, Value::Null, false),
            (true, json!(false), false),
            (true, json!(true), true),
        ] {
            let mut json = small();
            json["tie_word_embeddings"] = json!(tied);
            json["scale_decoder_outputs"] = key.clone();
            assert_eq!(T5Config::from_json(&json).unwrap().scales_output(), scaled, "{tied} {key}");
        }
    }

    #[test]
    fn gated_gelu_is_the_tanh_formula_unless_the_file_names_another() {
        let c = with("feed_forward_proj", json!("gated-gelu")).unwrap();
        assert_eq!((c.activation(), c.is_gated()), (Activation::GeluTanh, true));
        let mut json = small();
        json["feed_forward_proj"] = json!("gated-gelu");
        json["dense_act_fn"] = json!("gelu");
        let c = T5Config::from_json(&json).unwrap();
        assert_eq!((c.activation(), c.is_gated()), (Activation::Gelu, true));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_its_key() {
        for (key, value) in [
            ("feed_forward_proj", json!("gated-mish")),
            ("relative_attention_num_buckets", json!(30)),
            ("relative_attention_max_distance", json!(16)),
            ("dropout_rate", json!(1.0)),
            ("eos_token_id", json!(50)),
            ("decoder_start_token_id", json!(-1)),
            ("d_kv", json!(0)),
        ] {
            let message = with(key, value).unwrap_err();
            assert!(message.contains(&format!("text_config.{key}: got ")), "{message}");
        }
        let mut json = small();
        json.as_object_mut().unwrap().remove("decoder_start_token_id");
        let message = T5Config::from_json(&json).unwrap_err().to_string();
        assert!(message.contains("missing field `decoder_start_token_id`"), "{message}");
    }
}
