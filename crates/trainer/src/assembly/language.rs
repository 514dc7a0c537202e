//! The frozen language model as a configuration asks for it: its directory, what it computes, and what stands around its captions.

use blip2_model::Activation;
use blip2_model::dropout::DropoutRates;
use blip2_model::language::{CaptionFrame, DecoderConfig, LanguageConfig};
use blip2_weights::{ModelDir, Part};
use serde_json::{Value, json};
use tch::Kind;

use crate::config::{AutoOr, Config, Gelu, LanguageDropout, Prefix};
use crate::data::text::TextFrame;
use crate::error::Error;

/// What `model.language` says of a model, checked against the model.
pub struct LanguagePlan {
    /// Where its weights lie.
    pub dir: ModelDir,
    /// Its configuration as `text_config` of what is trained.
    pub json: Value,
    /// The same, read.
    pub config: LanguageConfig,
    /// Tokens in front of the queries; an encoder-decoder has no place for them.
    pub before_queries: Option<Vec<i64>>,
    /// Storage of its weights.
    pub dtype: Kind,
    /// The rates of its dropout while training.
    pub dropout: DropoutRates,
    /// Captions to what it reads and writes.
    pub text: TextFrame,
}

impl LanguagePlan {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// No such section, files that are missing or damaged, a key that asks for what this kind of model cannot do.
    pub fn open(config: &Config) -> Result<LanguagePlan, Error> {
        let Some(language) = &config.model.language else {
            return Err(Error::Mismatch("model.language: missing; stage 2 needs one".into()));
        };
        let dir = language.weights.open()?;
        let wrong = |source| Error::Model { path: dir.path().into(), source };
        // Whoever reads the exported model may not know newer keys.
        let mut json = DecoderConfig::with_older_keys(dir.part(Part::Language)?.config).map_err(wrong)?;
        let model = |json: &Value| LanguageConfig::from_json(json).map_err(wrong);
        let mut parsed = model(&json)?;
        if language.gelu == Gelu::Exact {
            json = with_exact_gelu(json, &parsed)?;
            parsed = model(&json)?;
        }
        let file = language.weights.join("tokenizer.json");
        let max_tokens = config.task.max_text_tokens;
        let dropout = match language.dropout {
            LanguageDropout::Parity => parsed.dropout_rates(),
            LanguageDropout::Rate(rate) => DropoutRates::all(rate),
        };
        let (before_queries, text) = match &parsed {
            LanguageConfig::Decoder(decoder) => {
                if language.prefix == Prefix::Split {
                    return refused("prefix", "none for a decoder-only model", "split, which is for encoder-decoders");
                }
                let before: Vec<i64> = match &language.before_queries {
                    AutoOr::Auto => match decoder.frame {
                        CaptionFrame::BosFirst => decoder.bos_token_id.into_iter().collect(),
                        CaptionFrame::Opt => Vec::new(),
                    },
                    AutoOr::Given(ids) => ids.0.iter().map(|&id| id as i64).collect(),
                };
                let length = before.len() + config.model.qformer.query_tokens + max_tokens;
                if let Some(longest) = decoder.max_positions().filter(|&longest| length as i64 > longest) {
                    let expected = format!("queries and text within the {longest} positions of the language model");
                    return Err(Error::key("task.max_text_tokens", expected, length, ""));
                }
                (Some(before), TextFrame::decoder(&file, max_tokens, &language.prompt, &parsed)?)
            }
            LanguageConfig::T5(t5) => {
                if let AutoOr::Given(ids) = &language.before_queries
                    && !ids.0.is_empty()
                {
                    return refused("before_queries", "auto or [] for an encoder-decoder", &format!("{:?}", ids.0));
                }
                let split_seed = (language.prefix == Prefix::Split).then_some(config.run.seed);
                let text = TextFrame::encoder_decoder(&file, max_tokens, &language.prompt, t5, split_seed)?;
                (None, text)
            }
        };
        if parsed.eos_token_ids().first() != text.end_tokens().first() {
            // What ends the captions that are trained on ends those of the exported model.
            json["eos_token_id"] = json!(text.end_tokens()[0]);
        }
        check_ids(before_queries.as_deref().unwrap_or_default(), parsed.vocab_size())?;
        Ok(LanguagePlan { json, config: parsed, before_queries, dtype: language.dtype.kind(), dropout, text, dir })
    }
}

/// The configuration with GELU by its definition, as LAVIS ran FlanT5; `transformers` reads it from there, too.
fn with_exact_gelu(mut json: Value, config: &LanguageConfig) -> Result<Value, Error> {
    match config {
        LanguageConfig::T5(t5) if matches!(t5.activation(), Activation::Gelu | Activation::GeluTanh) => {
            // `transformers` takes both from the file where they stand in it, and else works them out of `feed_forward_proj`.
            json["is_gated_act"] = json!(t5.is_gated());
            json["dense_act_fn"] = json!("gelu");
            Ok(json)
        }
        _ => refused("gelu", "config for a model without T5's approximated GELU", "exact"),
    }
}

fn check_ids(before: &[i64], vocabulary: i64) -> Result<(), Error> {
    match before.iter().find(|&&id| !(0..vocabulary).contains(&id)) {
        None => Ok(()),
        Some(id) => refused("before_queries", &format!("ids below the vocabulary's {vocabulary}"), &id.to_string()),
    }
}

fn refused<T>(key: &str, expected: &str, got: &str) -> Result<T, Error> {
    Err(Error::key(format!("model.language.{key}"), expected, got, ""))
}
