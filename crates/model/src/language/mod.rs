//! Frozen language models.

pub mod beam;
pub mod decoder;
pub mod generate;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::ConfigError;
use crate::dropout::{Dropout, DropoutRates};
pub use decoder::{CaptionFrame, Decoder, DecoderConfig, KvCache};
pub use generate::{Decoding, GenerateOptions, Prompt, generate};

/// A language model's configuration, by `model_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum LanguageConfig {
    /// A decoder: OPT, GPT-2, Llama and its descendants, Gemma.
    Decoder(DecoderConfig),
}

impl LanguageConfig {
    /// Reads a model's `config.json` (or `text_config`).
    ///
    /// # Errors
    /// An unknown `model_type`, a missing key, a value that no code of ours computes.
    pub fn from_json(json: &Value) -> Result<LanguageConfig, ConfigError> {
        let unknown = || ConfigError::Unsupported {
            part: "text_config",
            key: "model_type",
            got: json
                .get("model_type")
                .map_or("none".into(), |got| got.as_str().map_or(got.to_string(), str::to_string)),
            supported: DecoderConfig::KNOWN,
        };
        DecoderConfig::from_json(json).ok_or_else(unknown)?.map(LanguageConfig::Decoder)
    }

    /// Width of its embeddings.
    pub fn hidden_size(&self) -> i64 {
        match self {
            LanguageConfig::Decoder(c) => c.hidden_size(),
        }
    }

    /// Size of its vocabulary.
    pub fn vocab_size(&self) -> i64 {
        match self {
            LanguageConfig::Decoder(c) => c.vocab_size,
        }
    }

    /// Its first token, where it has one.
    pub fn bos_token_id(&self) -> Option<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.bos_token_id,
        }
    }

    /// Its end tokens; the first is the one that training appends.
    pub fn eos_token_ids(&self) -> Vec<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.eos_token_ids.clone(),
        }
    }

    /// The token that fills batches: its own, else an end token.
    pub fn pad_token_id(&self) -> i64 {
        let pad = match self {
            LanguageConfig::Decoder(c) => c.pad_token_id,
        };
        pad.or(self.eos_token_ids().first().copied()).unwrap_or(0)
    }

    /// What stands around the queries and a caption.
    pub fn caption_frame(&self) -> CaptionFrame {
        match self {
            LanguageConfig::Decoder(c) => c.frame,
        }
    }

    /// Rates of dropout that the model was trained with.
    pub fn dropout_rates(&self) -> DropoutRates {
        match self {
            LanguageConfig::Decoder(c) => c.dropout,
        }
    }

    /// The longest sequence that its positions allow, where they end.
    pub fn max_positions(&self) -> Option<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.max_positions(),
        }
    }

    /// Declares the model below `scope`.
    pub fn build(&self, scope: &Scope) -> LanguageModel {
        match self {
            LanguageConfig::Decoder(c) => LanguageModel::Decoder(Decoder::new(scope, c)),
        }
    }
}

/// A decoder-only language model.
#[derive(Debug)]
pub enum LanguageModel {
    /// Any of the decoders.
    Decoder(Decoder),
}

impl LanguageModel {
    /// The dtype it computes in: that of its weights.
    pub fn kind(&self) -> Kind {
        match self {
            LanguageModel::Decoder(m) => m.kind(),
        }
    }

    /// `ids i64 [.., T] -> [.., T, hidden]` in the model's dtype.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        match self {
            LanguageModel::Decoder(m) => m.embed(ids),
        }
    }

    /// Final hidden states of right-padded sequences under the causal mask; rows of padding hold no meaning.
    ///
    /// # Shapes
    /// `embeds [B, L, hidden] -> [B, L, hidden]`.
    pub fn forward(&self, embeds: &Tensor, dropout: &Dropout) -> Tensor {
        match self {
            LanguageModel::Decoder(m) => m.forward(embeds, dropout),
        }
    }

    /// Final hidden states of the rows behind a cache, which grows by them.
    ///
    /// # Shapes
    /// `embeds [B, L, hidden]`; `mask bool [B, cached + L]`, true at tokens (left padding).
    pub fn forward_cached(&self, embeds: &Tensor, mask: &Tensor, cache: &mut KvCache) -> Tensor {
        match self {
            LanguageModel::Decoder(m) => m.forward_cached(embeds, mask, cache),
        }
    }

    /// `hidden [.., hidden] -> logits [.., vocabulary]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        match self {
            LanguageModel::Decoder(m) => m.logits(hidden),
        }
    }
}
