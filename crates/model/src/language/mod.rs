//! Frozen language models.

pub mod beam;
pub mod generate;
pub mod llama;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::ConfigError;
pub use generate::{Decoding, GenerateOptions, Prompt, generate};
pub use llama::{KvCache, Llama, LlamaConfig};

/// A language model's configuration, by `model_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum LanguageConfig {
    /// `llama`.
    Llama(LlamaConfig),
}

impl LanguageConfig {
    /// Reads a model's `config.json` (or `text_config`).
    ///
    /// # Errors
    /// An unknown `model_type`, a missing key, a value that no code of ours computes.
    pub fn from_json(json: &Value) -> Result<LanguageConfig, ConfigError> {
        match json.get("model_type").and_then(Value::as_str) {
            Some("llama") => LlamaConfig::from_json(json).map(LanguageConfig::Llama),
            other => Err(ConfigError::Unsupported {
                part: "text_config",
                key: "model_type",
                got: other.unwrap_or("none").into(),
                supported: "llama",
            }),
        }
    }

    /// Width of its embeddings.
    pub fn hidden_size(&self) -> i64 {
        match self {
            LanguageConfig::Llama(c) => c.hidden_size,
        }
    }

    /// Size of its vocabulary.
    pub fn vocab_size(&self) -> i64 {
        match self {
            LanguageConfig::Llama(c) => c.vocab_size,
        }
    }

    /// Its first token, where it has one.
    pub fn bos_token_id(&self) -> Option<i64> {
        match self {
            LanguageConfig::Llama(c) => c.bos_token_id,
        }
    }

    /// Its end tokens; the first is the one that training appends.
    pub fn eos_token_ids(&self) -> Vec<i64> {
        match self {
            LanguageConfig::Llama(c) => c.eos_token_id.as_ref().map(llama::TokenIds::all).unwrap_or_default(),
        }
    }

    /// The token that fills batches: its own, else an end token.
    pub fn pad_token_id(&self) -> i64 {
        let pad = match self {
            LanguageConfig::Llama(c) => c.pad_token_id,
        };
        pad.or(self.eos_token_ids().first().copied()).unwrap_or(0)
    }

    /// Declares the model below `scope`.
    pub fn build(&self, scope: &Scope) -> LanguageModel {
        match self {
            LanguageConfig::Llama(c) => LanguageModel::Llama(Llama::new(scope, c)),
        }
    }
}

/// A decoder-only language model.
#[derive(Debug)]
pub enum LanguageModel {
    /// The Llama family.
    Llama(Llama),
}

impl LanguageModel {
    /// The dtype it computes in: that of its weights.
    pub fn kind(&self) -> Kind {
        match self {
            LanguageModel::Llama(m) => m.kind(),
        }
    }

    /// `ids i64 [.., T] -> [.., T, hidden]` in the model's dtype.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        match self {
            LanguageModel::Llama(m) => m.embed(ids),
        }
    }

    /// Final hidden states of right-padded sequences under the causal mask; rows of padding hold no meaning.
    ///
    /// # Shapes
    /// `embeds [B, L, hidden] -> [B, L, hidden]`.
    pub fn forward(&self, embeds: &Tensor) -> Tensor {
        match self {
            LanguageModel::Llama(m) => m.forward(embeds),
        }
    }

    /// Final hidden states of the rows behind a cache, which grows by them.
    ///
    /// # Shapes
    /// `embeds [B, L, hidden]`; `mask bool [B, cached + L]`, true at tokens (left padding).
    pub fn forward_cached(&self, embeds: &Tensor, mask: &Tensor, cache: &mut KvCache) -> Tensor {
        match self {
            LanguageModel::Llama(m) => m.forward_cached(embeds, mask, cache),
        }
    }

    /// `hidden [.., hidden] -> logits [.., vocabulary]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        match self {
            LanguageModel::Llama(m) => m.logits(hidden),
        }
    }
}
