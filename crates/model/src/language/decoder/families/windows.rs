//! Which layers have a window.

use serde_json::Value;

use super::super::config::DecoderConfig;
use super::super::keys::{Keys, invalid, unsupported};
use crate::config::ConfigError;

/// The window of each of `count` layers by `layer_types`, else of those that `slides`.
pub(super) fn windows(
    keys: &Keys,
    count: usize,
    window: Option<i64>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<i64>>, ConfigError> {
    let Some(listed) = keys.value("layer_types") else {
        return Ok((0..count).map(|i| window.filter(|_| slides(i))).collect());
    };
    let types = listed.as_array().ok_or_else(|| invalid("layer_types", "a list", listed))?;
    if types.len() != count {
        return Err(unsupported("layer_types", format!("{} entries", types.len()), "one a layer"));
    }
    let window_of = |layer_type: &Value| match layer_type.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(unsupported("sliding_window", "null", "a size, for layer_types has sliding_attention"))
        }
        _ => Err(unsupported("layer_types", layer_type, "full_attention, sliding_attention")),
    };
    types.iter().map(window_of).collect()
}

/// The same with a window in each layer that has one.
pub(super) fn with_windows(mut c: DecoderConfig, window: impl Fn(usize) -> Option<i64>) -> DecoderConfig {
    for (i, layer) in c.layers.iter_mut().enumerate() {
        layer.window = window(i);
    }
    c
}
