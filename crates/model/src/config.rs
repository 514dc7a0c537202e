//! `config.json` of a BLIP-2 model, with Hugging Face's keys.

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use crate::language::LanguageConfig;
use crate::qformer::QFormerConfig;
use crate::vision::VisionConfig;

/// What errors call the keys beside the parts.
const TOP: &str = "top level";

/// Why a `config.json` cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A key is missing or has the wrong type.
    #[error("config.json: {part}: {message}")]
    Invalid {
        /// The part of the file.
        part: &'static str,
        /// What serde says of it.
        message: String,
    },
    /// A value that no code of ours computes.
    #[error("config.json: {part}.{key}: got {got}, supported: {supported}")]
    Unsupported {
        /// The part of the file.
        part: &'static str,
        /// The key.
        key: &'static str,
        /// Its value.
        got: String,
        /// What can be computed.
        supported: &'static str,
    },
}

/// A whole BLIP-2 model's configuration.
#[derive(Debug, Clone)]
pub struct Blip2Config {
    /// The frozen image encoder.
    pub vision: VisionConfig,
    /// The Q-Former.
    pub qformer: QFormerConfig,
    /// The frozen language model; absent in a stage-1 model.
    pub language: Option<LanguageConfig>,
    /// What stands beside the parts.
    pub top: TopConfig,
}

/// The top level's own keys.
#[derive(Debug, Clone, Deserialize)]
pub struct TopConfig {
    /// How many query tokens.
    pub num_query_tokens: i64,
    /// Width of the contrastive embeddings.
    #[serde(default = "default_image_text_hidden_size")]
    pub image_text_hidden_size: i64,
    /// The id that `transformers` replaces by a query; unused by us, kept for the export.
    #[serde(default)]
    pub image_token_index: Option<i64>,
    /// `[DEC]`, the first token of generation in stage 1; the vocabulary's last entry where absent.
    #[serde(default)]
    pub qformer_decoder_start_token_id: Option<i64>,
    /// Tokens in front of the queries (ours); absent: none, as `transformers` reads it.
    #[serde(default)]
    pub before_queries: Option<Vec<i64>>,
    /// Which hidden state of the tower serves as image features (ours); absent: the last.
    #[serde(default)]
    pub vision_feature_layer: Option<i64>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
}

fn default_image_text_hidden_size() -> i64 {
    256
}

impl Blip2Config {
    /// Reads a parsed `config.json`. A stage-1 model is told from a stage-2 model by `architectures`.
    ///
    /// # Errors
    /// Names the part and key that is missing, mistyped or not supported.
    pub fn from_json(json: &Value) -> Result<Blip2Config, ConfigError> {
        let top: TopConfig = parse(TOP, json)?;
        check_sizes(
            TOP,
            &[("num_query_tokens", top.num_query_tokens), ("image_text_hidden_size", top.image_text_hidden_size)],
        )?;
        let stage1 = top.architectures.as_ref().is_some_and(|a| a.iter().any(|a| a.contains("ImageTextRetrieval")));
        let part = |name: &'static str| {
            json.get(name).ok_or_else(|| ConfigError::Invalid { part: name, message: "missing".into() })
        };
        let config = Blip2Config {
            vision: VisionConfig::from_json(part("vision_config")?)?,
            qformer: QFormerConfig::from_json(part("qformer_config")?)?,
            language: if stage1 { None } else { Some(LanguageConfig::from_json(part("text_config")?)?) },
            top,
        };
        check_ids("qformer_decoder_start_token_id", &[config.decoder_start_token()], config.qformer.vocab_size)?;
        if let (Some(before), Some(language)) = (&config.top.before_queries, &config.language) {
            check_ids("before_queries", before, language.vocab_size())?;
        }
        Ok(config)
    }

    /// `[DEC]`: the configured id, or the last of the vocabulary.
    pub fn decoder_start_token(&self) -> i64 {
        self.top.qformer_decoder_start_token_id.unwrap_or(self.qformer.vocab_size - 1)
    }
}

/// Checks that ids of the top level are rows of an embedding table.
fn check_ids(key: &str, ids: &[i64], vocabulary: i64) -> Result<(), ConfigError> {
    match ids.iter().find(|&&id| !(0..vocabulary).contains(&id)) {
        None => Ok(()),
        Some(id) => Err(ConfigError::Invalid {
            part: TOP,
            message: format!("{key}: expected ids below the vocabulary's size of {vocabulary}, got {id}"),
        }),
    }
}

/// Parses one part, naming it in the error.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(part: &'static str, json: &Value) -> Result<T, ConfigError> {
    serde_json::from_value(json.clone()).map_err(|e| ConfigError::Invalid { part, message: e.to_string() })
}

/// Checks that sizes are positive and no larger than any model's.
pub(crate) fn check_sizes(part: &'static str, sizes: &[(&'static str, i64)]) -> Result<(), ConfigError> {
    sizes.iter().try_for_each(|&(key, value)| check_size(part, key, value))
}

/// Checks one size by its key. Layers are declared one by one before a file is compared with them, so a wrong number of them costs time.
pub(crate) fn check_size(part: &'static str, key: &'static str, value: i64) -> Result<(), ConfigError> {
    let few = key.ends_with("layers") || key.ends_with("heads") || ["n_layer", "n_head"].contains(&key);
    let (most, supported) = if few { (1000, "1 to 1,000") } else { (1 << 24, "1 to 2^24") };
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Unsupported { part, key, got: value.to_string(), supported })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The configuration of a model with one key beside the parts changed.
    fn with(stage: &str, key: &str, value: Value) -> Result<Blip2Config, String> {
        let mut json = json!({
            "architectures": [stage], "vision_config": {}, "qformer_config": {}, "text_config": {"model_type": "opt"}, "num_query_tokens": 32,
        });
        json[key] = value;
        Blip2Config::from_json(&json).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_and_ids_that_cannot_be_are_refused_by_key() {
        for stage in ["Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"] {
            assert!(with(stage, "image_text_hidden_size", json!(256)).is_ok());
            for (key, value, expected) in [
                ("num_query_tokens", json!(-1), "top level.num_query_tokens: got -1, supported: 1 to 2^24"),
                ("num_query_tokens", json!(1_000_000_000_000_000i64), "supported: 1 to 2^24"),
                ("image_text_hidden_size", json!(0), "top level.image_text_hidden_size: got 0"),
                (
                    "qformer_decoder_start_token_id",
                    json!(30_522),
                    "qformer_decoder_start_token_id: expected ids below the vocabulary's size of 30522, got 30522",
                ),
                ("qformer_decoder_start_token_id", json!(-1), "got -1"),
            ] {
                let message = with(stage, key, value).unwrap_err();
                assert!(message.contains(expected) && message.lines().count() == 1, "{message}");
            }
        }
        let message = with("Blip2ForConditionalGeneration", "before_queries", json!([2, 50_272])).unwrap_err();
        assert!(
            message.contains("before_queries: expected ids below the vocabulary's size of 50272, got 50272"),
            "{message}"
        );
        for key in ["eos_token_id", "bos_token_id", "pad_token_id"] {
            for id in [50_272, -2] {
                let text = json!({"model_type": "opt", key: id});
                let message = with("Blip2ForConditionalGeneration", "text_config", text).unwrap_err();
                assert!(message.contains(&format!("text_config.{key}: got {id}, supported: ids below")), "{message}");
            }
        }
    }

    #[test]
    fn more_layers_or_heads_than_any_model_has_are_refused_by_key() {
        for (part, keys) in [
            ("vision_config", json!({"num_hidden_layers": 1001})),
            ("qformer_config", json!({"num_hidden_layers": 5_000_000})),
            ("qformer_config", json!({"num_attention_heads": 1001, "hidden_size": 1001})),
            ("text_config", json!({"model_type": "opt", "num_hidden_layers": 16_000_000})),
            ("text_config", json!({"model_type": "gpt2", "n_layer": 1001})),
            ("text_config", json!({"model_type": "llama", "num_key_value_heads": 1001})),
            ("text_config", json!({"model_type": "t5", "decoder_start_token_id": 0, "num_decoder_layers": 1001})),
        ] {
            let key = keys
                .as_object()
                .unwrap()
                .keys()
                .find(|key| *key != "model_type" && *key != "decoder_start_token_id")
                .unwrap()
                .clone();
            let message = with("Blip2ForConditionalGeneration", part, keys.clone()).unwrap_err();
            let expected = format!("config.json: {part}.{key}: got {}, supported: 1 to 1,000", keys[&key]);
            assert_eq!(message, expected);
        }
        assert!(with("Blip2ForConditionalGeneration", "vision_config", json!({"num_hidden_layers": 1000})).is_ok());
    }

    #[test]
    fn a_q_former_s_vocabulary_is_that_of_transformers_where_the_file_leaves_it_out() {
        let config = with("Blip2ForImageTextRetrieval", "image_text_hidden_size", json!(256)).unwrap();
        assert_eq!((config.qformer.vocab_size, config.decoder_start_token()), (30_522, 30_521));
    }
}
