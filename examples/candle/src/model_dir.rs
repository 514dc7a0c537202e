//! The files of an exported directory.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::VarBuilder;
use serde_json::Value;

/// Parses a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: invalid JSON", path.display()))
}

/// All tensors of `model.safetensors`, or of the shards that its index names, computed with in fp32.
pub fn weights(dir: &Path, device: &Device) -> Result<VarBuilder<'static>> {
    let index = dir.join("model.safetensors.index.json");
    let files: BTreeSet<String> = if index.exists() {
        let json = read_json(&index)?;
        let places = json["weight_map"].as_object();
        let places = places.with_context(|| format!("{}: weight_map: expected an object", index.display()))?;
        places.values().filter_map(Value::as_str).map(String::from).collect()
    } else {
        BTreeSet::from(["model.safetensors".to_string()])
    };
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for file in files {
        if Path::new(&file).components().count() != 1 {
            bail!("{}: weight_map: expected names of files beside it, got {file:?}", index.display());
        }
        let path = dir.join(file);
        tensors.extend(safetensors::load(&path, device).map_err(|error| anyhow!("{}: {error}", path.display()))?);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, device))
}

/// What ends a text: the ids of `generation_config.json`, else the language model's own.
pub fn end_tokens(dir: &Path, text_config: &Value) -> Result<Vec<u32>> {
    let path = dir.join("generation_config.json");
    let generation = if path.exists() { read_json(&path)? } else { Value::Null };
    let named = [&generation["eos_token_id"], &text_config["eos_token_id"]];
    let named = named.into_iter().find(|value| !value.is_null()).unwrap_or(&Value::Null);
    let ids = match named {
        Value::Null => Vec::new(),
        Value::Array(ids) => ids.iter().collect(),
        one => vec![one],
    };
    ids.into_iter().map(|id| token_id(id, "eos_token_id")).collect()
}

/// A list of token ids in `config.json`; `None` where the key is absent.
pub fn token_ids(config: &Value, key: &str) -> Result<Option<Vec<u32>>> {
    match &config[key] {
        Value::Null => Ok(None),
        Value::Array(ids) => ids.iter().map(|id| token_id(id, key)).collect::<Result<_>>().map(Some),
        other => bail!("config.json: {key}: expected a list of ids, got {other}"),
    }
}

fn token_id(value: &Value, key: &str) -> Result<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).with_context(|| format!("{key}: expected ids, got {value}"))
}
