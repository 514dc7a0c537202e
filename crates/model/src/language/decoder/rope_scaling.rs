//! Rotary frequencies and the ways to stretch them over longer texts: `rope_scaling`.

use std::f64::consts::PI;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::keys::{Keys, invalid, unsupported};
use crate::config::ConfigError;

pub(super) const SUPPORTED: &str = "null, or rope_type default, linear, llama3, yarn, longrope";
/// Every `rope_type` of [`SUPPORTED`].
pub(super) const TYPES: [&str; 5] = ["default", "linear", "llama3", "yarn", "longrope"];

/// One table of rotation angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// How many numbers of a head are turned; the others stay.
    pub size: i64,
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor.
    Linear {
        /// Divides every frequency.
        factor: f64,
    },
    /// Llama 3.1: long waves are divided by `factor`, short ones stay, a ramp lies between.
    Llama3 {
        /// Divides the long waves.
        factor: f64,
        /// Waves longer than `original / low` are divided.
        low: f64,
        /// Waves shorter than `original / high` stay.
        high: f64,
        /// Positions of the first pre-training.
        original: f64,
    },
    /// YaRN: the same idea with a ramp over dimensions, and an attention factor.
    Yarn {
        /// Divides the long waves.
        factor: f64,
        /// First and last dimension of the ramp.
        ramp: (f64, f64),
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// LongRoPE (Phi-3): a factor a frequency, one list for texts up to `original` positions and one for longer texts.
    LongRope {
        /// Divisors for short texts.
        short: Vec<f64>,
        /// Divisors for long texts.
        long: Vec<f64>,
        /// The longest short text.
        original: i64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

impl RotaryConfig {
    /// Reads `rope_theta` and `rope_scaling`; `size` numbers of a head of `head_size` are turned.
    ///
    /// `phi_rotary`: Phi-3's files say `su` or `yarn` where they mean LongRoPE, and have an original length of 4096 where they name none.
    pub(super) fn read(
        keys: &Keys,
        size: i64,
        theta: f64,
        max_positions: i64,
        phi_rotary: bool,
    ) -> Result<RotaryConfig, ConfigError> {
        if size < 2 || size % 2 != 0 {
            return Err(unsupported("head_dim", size, "an even number of rotated dimensions"));
        }
        let scaling = match keys.value("rope_scaling") {
            None => RopeScaling::None,
            Some(scaling) => Reader { keys, scaling, size, theta, max_positions }.read(phi_rotary)?,
        };
        Ok(RotaryConfig { size, theta, scaling })
    }

    /// Frequencies of texts of up to `original` positions, of longer ones where they differ, and the factor of cosines and sines; in f32 in
    /// the order of operations of `transformers`.
    ///
    /// # Shapes
    /// `[size / 2]` each.
    pub(super) fn frequencies(&self, device: Device) -> (Tensor, Option<(Tensor, i64)>, f64) {
        let f32s = |values: &[f64]| Tensor::from_slice(values).to_kind(Kind::Float).to_device(device);
        let exponents = Tensor::arange_start_step(0, self.size, 2, (Kind::Float, device)) / self.size as f64;
        let periods = Tensor::full([1], self.theta, (Kind::Float, device)).pow(&exponents);
        match &self.scaling {
            RopeScaling::None => (periods.reciprocal(), None, 1.0),
            RopeScaling::Linear { factor } => (periods.reciprocal() / *factor, None, 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let plain = periods.reciprocal();
                let waves = plain.reciprocal() * (2.0 * PI);
                let stretched = &plain / *factor;
                let smooth = (waves.reciprocal() * *original - *low) / (high - low);
                let between = (1.0 - &smooth) * &stretched + &smooth * &plain;
                let long = waves.gt(original / low);
                let short = waves.lt(original / high);
                (stretched.where_self(&long, &plain.where_self(&short, &between)), None, 1.0)
            }
            RopeScaling::Yarn { factor, ramp: (first, last), attention_factor } => {
                let dimensions = Tensor::arange(self.size / 2, (Kind::Float, device));
                let stretched_share = ((dimensions - *first) / (last - first)).clamp(0.0, 1.0);
                let plain_share = 1.0 - &stretched_share;
                let stretched = (&periods * *factor).reciprocal();
                (stretched * (1.0 - &plain_share) + periods.reciprocal() * plain_share, None, *attention_factor)
            }
            RopeScaling::LongRope { short, long, original, attention_factor } => {
                let divided = |by: &[f64]| (f32s(by) * &periods).reciprocal();
                (divided(short), Some((divided(long), *original)), *attention_factor)
            }
        }
    }
}

/// Reads the object `rope_scaling`.
struct Reader<'a> {
    keys: &'a Keys<'a>,
    scaling: &'a Value,
    size: i64,
    theta: f64,
    max_positions: i64,
}

impl Reader<'_> {
    fn read(&self, phi_rotary: bool) -> Result<RopeScaling, ConfigError> {
        let named = |key: &str| self.scaling.get(key).filter(|value| !value.is_null());
        let (newer, older) = (named("rope_type"), named("type"));
        // Which of them counts differs among the classes and versions of `transformers`.
        if newer.is_some() && older.is_some() && newer != older {
            return Err(unsupported("rope_scaling", self.scaling, "the same in rope_type and type"));
        }
        match newer.or(older).and_then(Value::as_str) {
            Some("default") => Ok(RopeScaling::None),
            // Phi-3's class has a default where the others have none.
            Some("longrope") => self.longrope(phi_rotary.then_some(4096)),
            Some("su" | "yarn") if phi_rotary => self.longrope(Some(4096)),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.number("factor")? }),
            Some("llama3") => self.llama3(),
            Some("yarn") => self.yarn(),
            _ => Err(unsupported("rope_scaling", self.scaling, SUPPORTED)),
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ConfigError> {
        let (low, high) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        if low >= high {
            return Err(unsupported("rope_scaling", self.scaling, "low_freq_factor below high_freq_factor"));
        }
        let original = self.number("original_max_position_embeddings")?;
        Ok(RopeScaling::Llama3 { factor: self.number("factor")?, low, high, original })
    }

    fn yarn(&self) -> Result<RopeScaling, ConfigError> {
        let factor = self.number("factor")?;
        let original = self.unless_zero("original_max_position_embeddings")?.unwrap_or(self.max_positions as f64);
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let attention_factor = match self.optional("attention_factor")? {
            Some(given) => given,
            None => match (self.unless_zero("mscale")?, self.unless_zero("mscale_all_dim")?) {
                (Some(one), Some(all)) => magnitude(one) / magnitude(all),
                _ => magnitude(1.0),
            },
        };
        // The dimension that turns so many times over the original length.
        let dimension = |turns: f64| self.size as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let fast = dimension(self.unless_zero("beta_fast")?.unwrap_or(32.0));
        let slow = dimension(self.unless_zero("beta_slow")?.unwrap_or(1.0));
        let whole = match self.scaling.get("truncate") {
            None | Some(Value::Bool(true)) => true,
            // `transformers` has the default only where the key is absent.
            Some(Value::Bool(false) | Value::Null) => false,
            Some(value) => return Err(invalid("rope_scaling.truncate", "true or false", value)),
        };
        let (first, last) = if whole { (fast.floor(), slow.ceil()) } else { (fast, slow) };
        let (first, last) = (first.max(0.0), last.min(self.size as f64 - 1.0));
        let last = if first == last { last + 0.001 } else { last };
        Ok(RopeScaling::Yarn { factor, ramp: (first, last), attention_factor })
    }

    fn longrope(&self, default_original: Option<i64>) -> Result<RopeScaling, ConfigError> {
        let max = self.max_positions;
        let original = self.keys.nullable_size("original_max_position_embeddings", default_original)?;
        let factor = || match original {
            Some(original) => Ok(max as f64 / original as f64),
            None => self.number("factor"),
        };
        let stretched = |factor: f64| (1.0 + factor.ln() / (original.unwrap_or(max) as f64).ln()).sqrt();
        let attention_factor = match self.optional("attention_factor")? {
            Some(given) => given,
            None => Some(factor()?).filter(|&factor| factor > 1.0).map_or(1.0, stretched),
        };
        let original = original.unwrap_or(max);
        let (short, long) = (self.list("short_factor")?, self.list("long_factor")?);
        Ok(RopeScaling::LongRope { short, long, original, attention_factor })
    }

    /// A number above zero.
    fn number(&self, key: &str) -> Result<f64, ConfigError> {
        let missing = || invalid(&format!("rope_scaling.{key}"), "a number above 0", &Value::Null);
        self.optional(key)?.ok_or_else(missing)
    }

    fn optional(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.scaling.get(key).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => Err(invalid(&format!("rope_scaling.{key}"), "a number above 0", value)),
            },
        }
    }

    /// [`Reader::optional`] where `transformers` takes 0 for a key that is not set.
    fn unless_zero(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        if self.scaling.get(key).and_then(Value::as_f64) == Some(0.0) { Ok(None) } else { self.optional(key) }
    }

    /// One number above zero for each frequency.
    fn list(&self, key: &str) -> Result<Vec<f64>, ConfigError> {
        let value = self.scaling.get(key).unwrap_or(&Value::Null);
        let numbers: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        let numbers = numbers.filter(|list| list.iter().all(|&n| n.is_finite() && n > 0.0));
        let count = self.size / 2;
        numbers
            .filter(|list| list.len() as i64 == count)
            .ok_or_else(|| invalid(&format!("rope_scaling.{key}"), &format!("{count} numbers above 0"), value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(scaling: Value) -> Result<RotaryConfig, String> {
        let config = json!({ "rope_scaling": scaling });
        RotaryConfig::read(&Keys::new(&config), 8, 10_000.0, 128, false).map_err(|e| e.to_string())
    }

    fn floats(t: &Tensor) -> Vec<f32> {
        Vec::<f32>::try_from(t).unwrap()
    }

    #[test]
    fn the_message_about_an_unknown_type_lists_every_one() {
        assert!(SUPPORTED.ends_with(&TYPES.join(", ")));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = floats(&read(Value::Null).unwrap().frequencies(Device::Cpu).0);
        let divided = floats(&read(json!({"type": "linear", "factor": 4.0})).unwrap().frequencies(Device::Cpu).0);
        assert_eq!(plain[0], 1.0);
        for (p, d) in plain.iter().zip(&divided) {
            assert_eq!(p / 4.0, *d);
        }
    }

    #[test]
    fn yarn_s_ramp_ends_at_whole_dimensions_unless_truncate_says_otherwise() {
        let ramp = |truncate: Option<Value>| {
            let mut yarn = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0});
            yarn.as_object_mut().unwrap().extend(truncate.map(|value| ("truncate".to_string(), value)));
            read(yarn).map(|config| match config.scaling {
                RopeScaling::Yarn { ramp, .. } => ramp,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(ramp(None), Ok((0.0, 2.0)));
        assert_eq!(ramp(Some(json!(true))), Ok((0.0, 2.0)));
        let exact = ramp(Some(json!(false))).unwrap();
        assert!((exact.0 - 0.707).abs() < 1e-3 && (exact.1 - 1.309).abs() < 1e-3, "{exact:?}");
        assert_eq!(ramp(Some(Value::Null)), Ok(exact));
        let refused = ramp(Some(json!("no"))).unwrap_err();
        assert!(refused.contains("rope_scaling.truncate: expected true or false, got \"no\""), "{refused}");
    }

    #[test]
    fn longrope_needs_a_factor_only_for_an_attention_factor_that_is_not_given() {
        let longrope = |more: Value| {
            let mut json = json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]});
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            read(json).map(|config| match config.scaling {
                RopeScaling::LongRope { original, attention_factor, .. } => (original, attention_factor),
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(longrope(json!({"attention_factor": 1.5})), Ok((128, 1.5)));
        assert_eq!(longrope(json!({"factor": 1})), Ok((128, 1.0)));
        let (original, stretched) = longrope(json!({"factor": 128})).unwrap();
        assert!(original == 128 && (stretched - 2f64.sqrt()).abs() < 1e-12, "{stretched}");
        assert!(longrope(json!({})).unwrap_err().contains("rope_scaling.factor: expected a number above 0, got null"));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_its_key() {
        let dynamic = read(json!({"rope_type": "dynamic", "factor": 2.0})).unwrap_err();
        assert!(dynamic.contains("text_config.rope_scaling: got {\"rope_type\":\"dynamic\""), "{dynamic}");
        assert!(dynamic.contains("longrope"), "{dynamic}");
        let two = json!({"rope_type": "default", "type": "linear", "factor": 2.0});
        assert!(read(two).unwrap_err().contains("supported: the same in rope_type and type"));
        assert!(read(json!({"rope_type": "linear", "type": "linear", "factor": 2.0})).is_ok());
        let missing = read(json!({"rope_type": "linear"})).unwrap_err();
        assert_eq!(missing, "config.json: text_config: rope_scaling.factor: expected a number above 0, got null");
        let short = json!({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1, 1, 1, 1]});
        assert!(read(short).unwrap_err().contains("rope_scaling.short_factor: expected 4 numbers above 0, got [1.0]"));
    }
}
