//! The JSON files of an export.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::directory::Part;
use crate::error::WeightsError;
use crate::export::{Export, ExportTask, Towers};
use crate::frozen_elsewhere::{FROZEN_KEY, FrozenElsewhere};
use crate::json_file::{describe, read_error, read_object};
use crate::staging::write_file;

/// The `config.json` key by which an export knows its own kind, so as never to overwrite anything else.
pub(crate) const PRODUCER_KEY: &str = "exported_by";
pub(crate) const PRODUCER: &str = concat!("blip2 ", env!("CARGO_PKG_VERSION"));

/// How pictures become pixels: resize, rescale, normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePreprocessing {
    /// Side of the square in pixels.
    pub size: u32,
    /// Pillow's number of the filter that resizes.
    pub resample: u8,
    /// What a byte is multiplied by.
    pub rescale_factor: f64,
    /// Mean of each of red, green, blue.
    pub mean: [f64; 3],
    /// Standard deviation of each.
    pub std: [f64; 3],
}

/// `config.json`.
pub(crate) fn model_config(export: &Export) -> Result<Value, WeightsError> {
    let vision = export.vision.part(Part::Vision)?;
    let origin = export.vision.path().join("config.json");
    // A file may leave the number to its class; whoever chose the depth has asked that.
    let blocks = match vision.config.get("num_hidden_layers") {
        None | Some(Value::Null) => export.vision_depth,
        Some(_) => unsigned_in(&origin, vision.config, "num_hidden_layers")?,
    };
    if export.vision_depth == 0 || export.vision_depth > blocks {
        return Err(WeightsError::Key {
            path: origin,
            key: "num_hidden_layers".into(),
            expected: format!("at least {}, the depth in use", export.vision_depth.max(1)),
            got: blocks.to_string(),
        });
    }
    let mut vision_config = vision.config.clone();
    vision_config["num_hidden_layers"] = json!(export.vision_depth);
    if export.resized_positions().is_some() {
        vision_config["image_size"] = json!(export.image.size);
    }
    if let Some(section) = vision_config.as_object_mut() {
        // DINOv2's stages as a backbone, which name blocks that a cut tower has not; the class works them out.
        section.retain(|key, _| !["out_features", "out_indices", "stage_names"].contains(&key.as_str()));
    }
    let mut qformer = export.qformer_config.clone();
    if let Some(qformer) = qformer.as_object_mut() {
        qformer.insert("model_type".into(), json!("blip_2_qformer"));
        qformer.insert("use_qformer_text_input".into(), json!(matches!(export.task, ExportTask::Stage1 { .. })));
    }
    let blip2_vit = vision_config.get("model_type").is_none_or(|t| t == "blip_2_vision_model");

    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.into(), value);
    set("model_type", json!("blip-2"));
    set("vision_config", vision_config);
    set("qformer_config", qformer);
    set("num_query_tokens", json!(export.num_query_tokens));
    if !blip2_vit {
        // hidden_states[depth] as transformers counts them; no BLIP-2 class knows this key, for none has another tower.
        set("vision_feature_layer", json!(export.vision_depth));
    }
    match &export.task {
        ExportTask::Stage1 { image_text_hidden_size, decoder_start_token_id } => {
            set("architectures", json!(["Blip2ForImageTextRetrieval"]));
            set("image_text_hidden_size", json!(image_text_hidden_size));
            set("image_token_index", Value::Null);
            set("qformer_decoder_start_token_id", json!(decoder_start_token_id));
        }
        ExportTask::Stage2 { text_config, before_queries, image_token_index, .. } => {
            set("architectures", json!(["Blip2ForConditionalGeneration"]));
            set("text_config", (*text_config).clone());
            set("image_token_index", json!(image_token_index));
            if let Some(before) = before_queries {
                set("before_queries", json!(before));
            }
        }
    }
    if let Towers::Named(towers) = export.towers {
        let entry = |tower: &FrozenElsewhere| {
            let value = json!({"source": tower.source, "path": tower.path, "digest": tower.digest});
            (tower.part.key().to_string(), value)
        };
        set(FROZEN_KEY, Value::Object(towers.iter().map(entry).collect()));
    }
    set(PRODUCER_KEY, json!(PRODUCER));
    Ok(Value::Object(config))
}

/// The `dtype` key: what `transformers` loads the model in under `dtype="auto"`; it keeps the Q-Former in fp32 by itself.
pub(crate) fn dtype_name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Float => Some("float32"),
        Kind::Half => Some("float16"),
        Kind::BFloat16 => Some("bfloat16"),
        _ => None,
    }
}

/// `preprocessor_config.json`, which `BlipImageProcessor` reads.
pub(crate) fn preprocessor_config(image: &ImagePreprocessing) -> Value {
    json!({
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": {"height": image.size, "width": image.size},
        "resample": image.resample,
        "do_rescale": true,
        "rescale_factor": image.rescale_factor,
        "do_normalize": true,
        "image_mean": image.mean,
        "image_std": image.std,
    })
}

/// A language model's configuration with the end tokens that only the `generation_config.json` of its directory `language` has:
/// `transformers` ends a caption by `text_config.eos_token_id` alone.
///
/// # Errors
/// A file that cannot be read.
pub fn with_all_ends(text_config: &Value, language: &Path) -> Result<Value, WeightsError> {
    let mut text_config = text_config.clone();
    let path = language.join("generation_config.json");
    if !path.exists() {
        return Ok(text_config);
    }
    let ids = |value: &Value| match value {
        Value::Array(ids) => ids.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let (mut ends, also) = (ids(&text_config["eos_token_id"]), ids(&read_object(&path)?["eos_token_id"]));
    ends.extend(also);
    let mut once: Vec<Value> = Vec::new();
    ends.into_iter().for_each(|id| {
        if !once.contains(&id) {
            once.push(id)
        }
    });
    match once.as_slice() {
        [] => {}
        [one] => text_config["eos_token_id"] = one.clone(),
        _ => text_config["eos_token_id"] = Value::Array(once),
    }
    Ok(text_config)
}

/// `generation_config.json` for a language model whose directory has none.
pub(crate) fn generation_config(text_config: &Value) -> Value {
    let keys = ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"];
    // What T5's configuration class has where the file says nothing; a generation configuration has no such defaults.
    let t5 = text_config.get("model_type").and_then(Value::as_str) == Some("t5");
    let family: &[(&str, i64)] = if t5 { &[("eos_token_id", 1), ("pad_token_id", 0)] } else { &[] };
    let ids = keys.iter().filter_map(|&key| {
        let default = family.iter().find(|(name, _)| *name == key).map(|(_, id)| json!(id));
        let id = text_config.get(key).cloned().or(default).filter(|id| !id.is_null())?;
        Some((key.to_string(), id))
    });
    Value::Object(ids.collect())
}

/// A count in the configuration at `origin`.
pub(crate) fn unsigned_in(origin: &Path, section: &Value, key: &str) -> Result<usize, WeightsError> {
    let value = section.get(key);
    value.and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).ok_or_else(|| WeightsError::Key {
        path: origin.to_path_buf(),
        key: key.into(),
        expected: "a count".into(),
        got: describe(value),
    })
}

/// Writes a value as indented JSON.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), WeightsError> {
    write_file(path, |file| {
        let written = std::io::Write::write_all(file, format!("{value:#}\n").as_bytes());
        written.map_err(|source| WeightsError::Write { path: path.to_path_buf(), source })
    })
}

/// Copies those of `names` that exist from one directory to another.
pub(crate) fn copy_present(from: &Path, to: &Path, names: &[&str]) -> Result<(), WeightsError> {
    for name in names {
        let source = from.join(name);
        if source.is_file() {
            let bytes = fs::read(&source).map_err(|error| read_error(&source, error))?;
            let target = to.join(name);
            write_file(&target, |file| {
                let written = std::io::Write::write_all(file, &bytes);
                written.map_err(|source| WeightsError::Write { path: target.clone(), source })
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_t5_ends_its_texts_though_its_configuration_leaves_the_token_out() {
        let written = generation_config(&json!({"model_type": "t5", "decoder_start_token_id": 0}));
        assert_eq!(written, json!({"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}));
        let written = generation_config(&json!({"model_type": "t5", "eos_token_id": 5, "pad_token_id": null}));
        assert_eq!(written, json!({"eos_token_id": 5}));
        assert_eq!(generation_config(&json!({"model_type": "llama"})), json!({}));
    }
}
