//! Frozen language models: decoders, which continue a text, and encoder-decoders, which read one text and write another.

pub mod beam;
pub mod generate;
pub mod llama;
pub mod session;
pub mod t5;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::ConfigError;
pub use beam::EarlyStopping;
pub use generate::{Decoding, GenerateOptions, Prompt, generate};
pub use llama::{KvCache, Llama, LlamaConfig};
pub use t5::{T5, T5Config};

/// A language model's configuration, by `model_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum LanguageConfig {
    /// `llama`.
    Llama(LlamaConfig),
    /// `t5`: T5, T5 1.1, FlanT5.
    T5(T5Config),
}

impl LanguageConfig {
    /// Reads a model's `config.json` (or `text_config`).
    ///
    /// # Errors
    /// An unknown `model_type`, a missing key, a value that no code of ours computes.
    pub fn from_json(json: &Value) -> Result<LanguageConfig, ConfigError> {
        match json.get("model_type").and_then(Value::as_str) {
            Some("llama") => LlamaConfig::from_json(json).map(LanguageConfig::Llama),
            Some("t5") => T5Config::from_json(json).map(LanguageConfig::T5),
            other => Err(ConfigError::Unsupported {
                part: "text_config",
                key: "model_type",
                got: other.unwrap_or("none").into(),
                supported: "llama, t5",
            }),
        }
    }

    /// Width of its embeddings.
    pub fn hidden_size(&self) -> i64 {
        match self {
            LanguageConfig::Llama(c) => c.hidden_size,
            LanguageConfig::T5(c) => c.d_model,
        }
    }

    /// Size of its vocabulary.
    pub fn vocab_size(&self) -> i64 {
        match self {
            LanguageConfig::Llama(c) => c.vocab_size,
            LanguageConfig::T5(c) => c.vocab_size,
        }
    }

    /// Its first token, where it has one.
    pub fn bos_token_id(&self) -> Option<i64> {
        match self {
            LanguageConfig::Llama(c) => c.bos_token_id,
            LanguageConfig::T5(_) => None,
        }
    }

    /// Its end tokens; the first is the one that training appends.
    pub fn eos_token_ids(&self) -> Vec<i64> {
        match self {
            LanguageConfig::Llama(c) => c.eos_token_id.as_ref().map(llama::TokenIds::all).unwrap_or_default(),
            LanguageConfig::T5(c) => vec![c.eos_token_id],
        }
    }

    /// The token that fills batches: its own, else an end token.
    pub fn pad_token_id(&self) -> i64 {
        let pad = match self {
            LanguageConfig::Llama(c) => c.pad_token_id,
            LanguageConfig::T5(c) => Some(c.pad_token_id),
        };
        pad.or(self.eos_token_ids().first().copied()).unwrap_or(0)
    }

    /// Declares the model below `scope`.
    pub fn build(&self, scope: &Scope) -> LanguageModel {
        match self {
            LanguageConfig::Llama(c) => LanguageModel::Llama(Llama::new(scope, c)),
            LanguageConfig::T5(c) => LanguageModel::T5(T5::new(scope, c)),
        }
    }
}

/// A language model. What only one kind can do is a method of that kind's type, so neither is taken for the other.
#[derive(Debug)]
pub enum LanguageModel {
    /// A decoder: the Llama family.
    Llama(Llama),
    /// An encoder-decoder.
    T5(T5),
}

impl LanguageModel {
    /// The dtype it computes in: that of its weights.
    pub fn kind(&self) -> Kind {
        match self {
            LanguageModel::Llama(m) => m.kind(),
            LanguageModel::T5(m) => m.kind(),
        }
    }

    /// `ids i64 [.., T] -> [.., T, hidden]` in the model's dtype.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        match self {
            LanguageModel::Llama(m) => m.embed(ids),
            LanguageModel::T5(m) => m.embed(ids),
        }
    }
}
