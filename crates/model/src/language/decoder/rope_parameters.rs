//! `rope_parameters`, in which `transformers` 5 saves what version 4 had as `rope_theta`, `rope_scaling`, `partial_rotary_factor` and
//! `rope_local_base_freq`. They are brought back to the older keys, which all readers know, those of an export too.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::keys::{Keys, invalid, unsupported};
use super::rope_scaling::{SUPPORTED, TYPES};
use crate::config::ConfigError;

const KEY: &str = "rope_parameters";

/// Every key in `rope_` that is read here.
const KNOWN: [&str; 4] = ["rope_theta", "rope_scaling", "rope_local_base_freq", KEY];

/// The same configuration with version 4's keys.
///
/// # Errors
/// Values that have no counterpart there or contradict an older key beside them; a `rope_` key that nothing here computes.
pub(super) fn with_older_keys(json: &Value) -> Result<Cow<'_, Value>, ConfigError> {
    let keys = Keys::new(json);
    refuse_unknown(json)?;
    let Some(given) = keys.value(KEY) else { return Ok(Cow::Borrowed(json)) };
    let older = match given.as_object() {
        None => return Err(invalid(KEY, "an object", given)),
        Some(entries) if entries.is_empty() => Map::new(),
        Some(entries) if keys.text("model_type", "")? == "gemma3_text" => of_gemma3(&keys, entries)?,
        Some(entries) => flat(&keys, entries)?,
    };
    for (key, value) in &older {
        if let Some(standing) = keys.value(key).filter(|standing| !same_in(key, standing, value)) {
            return Err(unsupported(KEY, format!("{value} beside {key}: {standing}"), "what the older key says"));
        }
    }
    let mut renamed = json.clone();
    if let Some(object) = renamed.as_object_mut() {
        object.remove(KEY);
        // A null that says nothing new does not displace an equal older value.
        object.extend(older.into_iter().filter(|(_, value)| !value.is_null()));
    }
    Ok(Cow::Owned(renamed))
}

/// A key of a family that is not known here may change what is computed. `null` and `false` switch nothing on.
fn refuse_unknown(json: &Value) -> Result<(), ConfigError> {
    let unknown = |(key, value): &(&String, &Value)| {
        key.starts_with("rope_") && !KNOWN.contains(&key.as_str()) && !matches!(value, Value::Null | Value::Bool(false))
    };
    match json.as_object().into_iter().flatten().find(unknown) {
        Some((key, value)) => Err(invalid(key, "no such key, for nothing here computes it", value)),
        None => Ok(()),
    }
}

/// Gemma 3 has one table for layers with a window and one for the others.
fn of_gemma3(keys: &Keys, entries: &Map<String, Value>) -> Result<Map<String, Value>, ConfigError> {
    const NESTED: &str = "an object with full_attention and sliding_attention";
    let given = || Value::Object(entries.clone());
    if let Some(key) = entries.keys().find(|key| !["full_attention", "sliding_attention"].contains(&key.as_str())) {
        return Err(unsupported(KEY, format!("{key} in {}", given()), NESTED));
    }
    let of = |layers: &str| match entries.get(layers).filter(|value| !value.is_null()) {
        None => Ok(Map::new()),
        Some(Value::Object(entries)) => flat(keys, entries),
        Some(_) => Err(unsupported(KEY, given(), NESTED)),
    };
    let (mut older, local) = (of("full_attention")?, of("sliding_attention")?);
    if local.get("rope_scaling").is_some_and(|scaling| !scaling.is_null()) {
        return Err(unsupported(KEY, given(), "rope_type default in sliding_attention"));
    }
    if let Some(turned) = local.get("partial_rotary_factor").filter(|turned| turned.as_f64() != Some(1.0)) {
        return Err(unsupported("partial_rotary_factor", turned, "1"));
    }
    older.extend(local.get("rope_theta").map(|theta| ("rope_local_base_freq".to_string(), theta.clone())));
    Ok(older)
}

/// The older keys of one table.
fn flat(keys: &Keys, entries: &Map<String, Value>) -> Result<Map<String, Value>, ConfigError> {
    let given = || Value::Object(entries.clone());
    if entries.values().any(Value::is_object) {
        return Err(unsupported(KEY, given(), "one object for all layers of this model_type"));
    }
    let mut scaling = entries.clone();
    let mut older = Map::new();
    for key in ["rope_theta", "partial_rotary_factor"] {
        older.extend(scaling.remove(key).filter(|value| !value.is_null()).map(|value| (key.to_string(), value)));
    }
    let (named, old_name) = (scaling.remove("rope_type"), scaling.remove("type"));
    let named = named.or(old_name).filter(|named| !named.is_null()).unwrap_or_else(|| json!("default"));
    let rope_type = named.as_str().filter(|named| TYPES.contains(named));
    let rope_type = rope_type.ok_or_else(|| unsupported(KEY, given(), SUPPORTED))?;
    if rope_type == "default" {
        older.insert("rope_scaling".into(), Value::Null);
        return Ok(older);
    }
    // Version 5 gives this key beside rope_parameters precedence over the one in it.
    if let (Some(beside), Some(within)) =
        (keys.value("original_max_position_embeddings"), scaling.get("original_max_position_embeddings"))
        && !same(beside, within)
    {
        let got = format!("original_max_position_embeddings {within} in it, {beside} beside it");
        return Err(unsupported(KEY, got, "one number of these"));
    }
    if rope_type == "longrope" {
        longrope(keys, &mut scaling, &mut older)?;
    }
    // Phi-3's class of version 4 asks for this name.
    let name = if keys.text("model_type", "")? == "phi3" { "type" } else { "rope_type" };
    scaling.insert(name.into(), json!(rope_type));
    older.insert("rope_scaling".into(), Value::Object(scaling));
    Ok(older)
}

/// Version 4 has LongRoPE's original length beside `rope_scaling`, and computes the factor from it whatever `factor` says.
fn longrope(keys: &Keys, scaling: &mut Map<String, Value>, older: &mut Map<String, Value>) -> Result<(), ConfigError> {
    let key = "original_max_position_embeddings";
    let Some(original) = scaling.get(key).filter(|original| !original.is_null()).cloned() else { return Ok(()) };
    let number = |value: Option<&Value>| value.and_then(Value::as_f64);
    let (factor, longest) = (number(scaling.get("factor")), number(keys.value("max_position_embeddings")));
    let lengths = longest.zip(original.as_f64());
    // Without the key version 4 takes the whole length for the original one, and the factor as it is.
    if factor.is_some() && lengths.is_some_and(|(longest, original)| longest == original) {
        scaling.remove(key);
        return Ok(());
    }
    if let Some(factor) = factor
        && number(scaling.get("attention_factor")).is_none()
        && lengths.is_none_or(|(longest, original)| longest / original != factor)
    {
        return Err(unsupported(KEY, format!("factor {factor}"), "max_position_embeddings by the original length"));
    }
    scaling.remove("factor");
    scaling.remove(key);
    older.insert(key.into(), original);
    Ok(())
}

fn same_in(key: &str, standing: &Value, ours: &Value) -> bool {
    if key != "rope_scaling" {
        return same(standing, ours);
    }
    let plain = |scaling: &Value| {
        let mut entries = scaling.as_object().cloned().unwrap_or_default();
        let (named, old_name) = (entries.remove("rope_type"), entries.remove("type"));
        (named.or(old_name).unwrap_or_else(|| json!("default")), Value::Object(entries))
    };
    let ((one, of_one), (other, of_other)) = (plain(standing), plain(ours));
    one == other && (one == "default" || same(&of_one, &of_other))
}

/// Equal, where 100 is 100.0.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len() && one.iter().all(|(key, value)| other.get(key).is_some_and(|v| same(value, v)))
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: Value) -> Result<Value, String> {
        with_older_keys(&config).map(Cow::into_owned).map_err(|error| error.to_string())
    }

    #[test]
    fn one_table_becomes_the_older_keys() {
        let llama3 =
            json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64});
        let older = read(json!({"model_type": "llama", "rope_parameters": llama3})).unwrap();
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64});
        assert_eq!(older, json!({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling}));
        let plain = json!({"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
        assert_eq!(read(plain).unwrap(), json!({"model_type": "qwen3", "rope_theta": 1e6}));
        let same = json!({"model_type": "qwen3", "rope_theta": 100, "rope_parameters": {"rope_theta": 100.0}});
        assert_eq!(read(same).unwrap(), json!({"model_type": "qwen3", "rope_theta": 100.0}));
    }

    #[test]
    fn longrope_s_original_length_stands_beside_it_in_version_4() {
        let table = json!({
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "long_factor": [2.0], "short_factor": [1.0],
            "original_max_position_embeddings": 32,
        });
        let phi3 = json!({"model_type": "phi3", "max_position_embeddings": 64, "rope_parameters": table});
        let older = json!({
            "model_type": "phi3", "max_position_embeddings": 64, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "long_factor": [2.0], "short_factor": [1.0]},
        });
        assert_eq!(read(phi3.clone()).unwrap(), older);
        let mut with_factor = phi3.clone();
        with_factor["rope_parameters"]["factor"] = json!(2);
        assert_eq!(read(with_factor.clone()).unwrap(), older);
        with_factor["rope_parameters"]["factor"] = json!(3);
        assert!(read(with_factor).unwrap_err().contains("text_config.rope_parameters: got factor 3"));
        let mut beside = phi3;
        beside["original_max_position_embeddings"] = json!(16);
        assert!(read(beside).unwrap_err().contains("original_max_position_embeddings 32 in it, 16 beside it"));
    }

    #[test]
    fn gemma_3_has_a_table_for_each_kind_of_layer() {
        let nested = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        });
        let older = read(json!({"model_type": "gemma3_text", "rope_parameters": nested})).unwrap();
        let scaling = json!({"rope_type": "linear", "factor": 8.0});
        let expected = json!({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_scaling": scaling, "rope_local_base_freq": 1e4});
        assert_eq!(older, expected);
        for (rope, expected) in [
            (json!({"rope_type": "default", "rope_theta": 1e6}), "an object with full_attention and sliding_attention"),
            (
                json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
                "rope_type default in sliding_attention",
            ),
            (json!({"full_attention": 7}), "an object with full_attention and sliding_attention"),
        ] {
            let message = read(json!({"model_type": "gemma3_text", "rope_parameters": rope})).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn what_has_no_counterpart_or_contradicts_is_refused_by_name() {
        for (config, expected) in [
            (json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}), "text_config.rope_parameters: got {"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1}}}), "one object for all layers"),
            (json!({"rope_parameters": [1]}), "rope_parameters: expected an object, got [1]"),
            (
                json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}),
                "got 500000.0 beside rope_theta: 10000.0",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}),
                "beside rope_scaling: {",
            ),
            (json!({"rope_ratio": 2}), "rope_ratio: expected no such key, for nothing here computes it, got 2"),
        ] {
            let mut config = config;
            config["model_type"] = json!("llama");
            let message = read(config).unwrap_err();
            assert!(message.contains(expected) && message.lines().count() == 1, "{message}");
        }
        // As SmolLM's files have it.
        assert!(read(json!({"model_type": "llama", "rope_interleaved": false})).is_ok());
        let both = json!({
            "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        });
        assert!(read(both).is_ok());
    }
}
