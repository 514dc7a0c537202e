//! Frozen language models: decoders, which continue a text, and encoder-decoders, which read one text and write another.

pub mod beam;
pub mod decoder;
pub mod generate;
pub mod session;
pub mod t5;

use blip2_torchx::params::Scope;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::ConfigError;
use crate::dropout::DropoutRates;
pub use beam::EarlyStopping;
pub use decoder::{CaptionFrame, Decoder, DecoderConfig, KvCache};
pub use generate::{Decoding, GenerateOptions, Prompt, generate};
pub use t5::{T5, T5Config};

/// Every `model_type` that [`LanguageConfig::from_json`] reads: the decoders' and the encoder-decoders'.
const KNOWN: &str = "opt, gpt2, llama, mistral, qwen2, qwen3, smollm3, phi3, gemma, gemma2, gemma3_text, t5";

/// A language model's configuration, by `model_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum LanguageConfig {
    /// A decoder: OPT, GPT-2, Llama and its descendants, Gemma.
    Decoder(Box<DecoderConfig>),
    /// `t5`: T5, T5 1.1, FlanT5.
    T5(T5Config),
}

impl LanguageConfig {
    /// Reads a model's `config.json` (or `text_config`).
    ///
    /// # Errors
    /// An unknown `model_type`, a missing key, a value that no code of ours computes.
    pub fn from_json(json: &Value) -> Result<LanguageConfig, ConfigError> {
        let model_type = json.get("model_type");
        if model_type.and_then(Value::as_str) == Some("t5") {
            return T5Config::from_json(json).map(LanguageConfig::T5);
        }
        let unknown = || ConfigError::Unsupported {
            part: "text_config",
            key: "model_type",
            got: model_type.map_or("none".into(), |got| got.as_str().map_or(got.to_string(), str::to_string)),
            supported: KNOWN,
        };
        DecoderConfig::from_json(json).ok_or_else(unknown)?.map(|config| LanguageConfig::Decoder(Box::new(config)))
    }

    /// Width of its embeddings.
    pub fn hidden_size(&self) -> i64 {
        match self {
            LanguageConfig::Decoder(c) => c.hidden_size(),
            LanguageConfig::T5(c) => c.d_model,
        }
    }

    /// Size of its vocabulary.
    pub fn vocab_size(&self) -> i64 {
        match self {
            LanguageConfig::Decoder(c) => c.vocab_size,
            LanguageConfig::T5(c) => c.vocab_size,
        }
    }

    /// Its first token, where it has one.
    pub fn bos_token_id(&self) -> Option<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.bos_token_id,
            LanguageConfig::T5(_) => None,
        }
    }

    /// Its end tokens; the first is the one that training appends.
    pub fn eos_token_ids(&self) -> Vec<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.eos_token_ids.clone(),
            LanguageConfig::T5(c) => vec![c.eos_token_id],
        }
    }

    /// The token that fills batches: its own, else an end token.
    pub fn pad_token_id(&self) -> i64 {
        let pad = match self {
            LanguageConfig::Decoder(c) => c.pad_token_id,
            LanguageConfig::T5(c) => Some(c.pad_token_id),
        };
        pad.or(self.eos_token_ids().first().copied()).unwrap_or(0)
    }

    /// What stands around a decoder's queries and caption; an encoder-decoder has them in different texts.
    pub fn caption_frame(&self) -> Option<CaptionFrame> {
        match self {
            LanguageConfig::Decoder(c) => Some(c.frame),
            LanguageConfig::T5(_) => None,
        }
    }

    /// Rates of dropout that the model was trained with.
    pub fn dropout_rates(&self) -> DropoutRates {
        match self {
            LanguageConfig::Decoder(c) => c.dropout,
            LanguageConfig::T5(c) => DropoutRates::all(c.dropout_rate),
        }
    }

    /// The longest sequence that its positions allow, where they end.
    pub fn max_positions(&self) -> Option<i64> {
        match self {
            LanguageConfig::Decoder(c) => c.max_positions(),
            LanguageConfig::T5(_) => None,
        }
    }

    /// Declares the model below `scope`.
    pub fn build(&self, scope: &Scope) -> LanguageModel {
        match self {
            LanguageConfig::Decoder(c) => LanguageModel::Decoder(Box::new(Decoder::new(scope, c))),
            LanguageConfig::T5(c) => LanguageModel::T5(T5::new(scope, c)),
        }
    }
}

/// A language model. What only one kind can do is a method of that kind's type, so neither is taken for the other.
#[derive(Debug)]
pub enum LanguageModel {
    /// Any of the decoders.
    Decoder(Box<Decoder>),
    /// An encoder-decoder.
    T5(T5),
}

impl LanguageModel {
    /// The dtype it computes in: that of its weights.
    pub fn kind(&self) -> Kind {
        match self {
            LanguageModel::Decoder(m) => m.kind(),
            LanguageModel::T5(m) => m.kind(),
        }
    }

    /// The longest sequence that its positions allow, where they end.
    pub fn max_positions(&self) -> Option<i64> {
        match self {
            LanguageModel::Decoder(m) => m.max_positions(),
            LanguageModel::T5(_) => None,
        }
    }

    /// `ids i64 [.., T] -> [.., T, hidden]` in the model's dtype.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        match self {
            LanguageModel::Decoder(m) => m.embed(ids),
            LanguageModel::T5(m) => m.embed(ids),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_models_is_that_of_the_decoders_and_t5() {
        assert_eq!(KNOWN, format!("{}, t5", DecoderConfig::KNOWN));
    }
}
