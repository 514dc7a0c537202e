//! Reads a language model's `config.json` key by key, with the defaults that `transformers` leaves out when it writes one.

use serde_json::Value;

use crate::config::{ConfigError, check_size};

/// The part of `config.json` that errors name.
pub(super) const PART: &str = "text_config";

/// A `config.json` whose keys are asked for by name. A key that is absent has its default; so has `null` where no value can be meant by it.
pub(super) struct Keys<'a> {
    json: &'a Value,
}

impl<'a> Keys<'a> {
    pub(super) fn new(json: &'a Value) -> Keys<'a> {
        Keys { json }
    }

    /// The value, unless absent or `null`.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// A positive count.
    pub(super) fn size(&self, key: &'static str, default: i64) -> Result<i64, ConfigError> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    /// A positive count, where there is one.
    pub(super) fn optional_size(&self, key: &'static str) -> Result<Option<i64>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let size = value.as_i64().ok_or_else(|| invalid(key, "a count", value))?;
        check_size(PART, key, size).map(|()| Some(size))
    }

    /// A positive count: `default` where the key is absent, none where it is `null`.
    pub(super) fn nullable_size(&self, key: &'static str, default: Option<i64>) -> Result<Option<i64>, ConfigError> {
        if self.json.get(key).is_none() { Ok(default) } else { self.optional_size(key) }
    }

    /// A count that may be zero.
    pub(super) fn count(&self, key: &'static str, default: i64) -> Result<i64, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_i64().filter(|&count| count >= 0).ok_or_else(|| invalid(key, "a count", value))
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, key: &'static str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.optional_positive(key)?.unwrap_or(default))
    }

    /// [`Keys::positive`], none where the key is `null`.
    pub(super) fn nullable_positive(&self, key: &'static str, default: f64) -> Result<Option<f64>, ConfigError> {
        if self.json.get(key).is_none() { Ok(Some(default)) } else { self.optional_positive(key) }
    }

    /// A finite number above zero, where there is one.
    pub(super) fn optional_positive(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(invalid(key, "a number above 0", value)),
        }
    }

    /// A probability of dropout.
    pub(super) fn rate(&self, key: &'static str, default: f64) -> Result<f64, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        match value.as_f64() {
            Some(rate) if (0.0..1.0).contains(&rate) => Ok(rate),
            _ => Err(invalid(key, "a probability below 1", value)),
        }
    }

    pub(super) fn flag(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(key, "true or false", value))
    }

    pub(super) fn text(&self, key: &'static str, default: &'static str) -> Result<&'a str, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_str().ok_or_else(|| invalid(key, "a string", value))
    }

    /// A key of which one value alone can be computed, which is also its default.
    pub(super) fn only(&self, key: &'static str, supported: &'static str) -> Result<(), ConfigError> {
        match self.value(key).map(ToString::to_string) {
            Some(got) if got != supported => Err(unsupported(key, got, supported)),
            _ => Ok(()),
        }
    }

    /// Token ids below `vocabulary`: one, several, or none where the key is `null`.
    pub(super) fn tokens(&self, key: &'static str, default: &[i64], vocabulary: i64) -> Result<Vec<i64>, ConfigError> {
        let ids = match self.json.get(key) {
            None => default.to_vec(),
            Some(Value::Null) => Vec::new(),
            Some(value) => {
                let listed = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                let ids: Option<Vec<i64>> = listed.iter().map(Value::as_i64).collect();
                ids.ok_or_else(|| invalid(key, "a token id or a list of them", value))?
            }
        };
        match ids.iter().find(|&&id| !(0..vocabulary).contains(&id)) {
            Some(id) => Err(unsupported(key, id, "ids below vocab_size")),
            None => Ok(ids),
        }
    }

    /// The first of [`Keys::tokens`].
    pub(super) fn token(
        &self,
        key: &'static str,
        default: Option<i64>,
        vocabulary: i64,
    ) -> Result<Option<i64>, ConfigError> {
        Ok(self.tokens(key, default.as_slice(), vocabulary)?.first().copied())
    }

    /// `pad_token_id`; -1 stands for none in files of the first Llama.
    pub(super) fn pad(&self, default: Option<i64>, vocabulary: i64) -> Result<Option<i64>, ConfigError> {
        match self.value("pad_token_id").and_then(Value::as_i64) {
            Some(-1) => Ok(None),
            _ => self.token("pad_token_id", default, vocabulary),
        }
    }
}

/// A value that no code of ours computes.
pub(super) fn unsupported(key: &'static str, got: impl ToString, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { part: PART, key, got: got.to_string(), supported }
}

/// A value of the wrong type.
pub(super) fn invalid(key: &str, expected: &str, got: &Value) -> ConfigError {
    ConfigError::Invalid { part: PART, message: format!("{key}: expected {expected}, got {got}") }
}
