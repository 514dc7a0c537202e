//! The configuration that a file without one implies by its names and shapes.

use std::collections::BTreeMap;
use std::path::Path;

use blip2_torchx::params::TensorSource;
use serde_json::{Value, json};

use super::{POSITION_IDS, VISUAL_ENCODER};
use crate::error::WeightsError;
use crate::json_file::{describe, read_object};
use crate::weights_dir::WeightsDir;

/// Width of an attention head where no configuration says otherwise: BERT's and ViT-g's.
const QFORMER_HEAD_SIZE: i64 = 64;
const VIT_HEAD_SIZE: i64 = 88;
/// More than any model has; what is looked for in them costs their square.
const MAX_LAYERS: i64 = 1000;
/// LAVIS runs EVA's ViT-g without its last block.
const VIT_G_BLOCKS: i64 = 40;
/// `bert-base-uncased` with `[DEC]`, for files without the text half.
const VOCABULARY: i64 = 30_523;
const POSITIONS: i64 = 512;

/// What a file of LAVIS holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What stage 1 or stage 2 trained.
    Checkpoint,
    /// The image encoder alone.
    Vit,
}

/// Tells by the tensors' names.
///
/// # Errors
/// Neither.
pub(crate) fn kind_of(weights: &WeightsDir) -> Result<Kind, WeightsError> {
    if weights.contains("query_tokens") && weights.contains("Qformer.bert.encoder.layer.0.attention.self.query.weight")
    {
        Ok(Kind::Checkpoint)
    } else if weights.contains("cls_token") && weights.contains("blocks.0.attn.qkv.weight") {
        Ok(Kind::Vit)
    } else {
        Err(WeightsError::NotLavis { path: weights.path().to_path_buf() })
    }
}

/// `config.json` of a checkpoint: `qformer_config`, the number of queries, and `vision_config` where [`checkpoint_vision`] can tell it.
///
/// Everything but the number of attention heads follows from the shapes. Heads are of width 64, unless a `config.json` beside the file, of a
/// BERT or a BLIP-2, says how many there are.
///
/// # Errors
/// Tensors that are missing or contradict each other, a `config.json` that does not fit, a width that 64 does not divide.
pub(crate) fn checkpoint_config(weights: &WeightsDir) -> Result<Value, WeightsError> {
    let shapes = Shapes::of(weights);
    let layer = "Qformer.bert.encoder.layer.";
    let [_, queries, width] = shapes.axes("query_tokens")?;
    let layers = shapes.count(layer)?;
    let [image_width] = shapes.axes("ln_vision.weight")?;
    let [intermediate, _] = shapes.axes(&format!("{layer}0.intermediate_query.dense.weight"))?;
    let crossed = |i: i64| shapes.has(&format!("{layer}{i}.crossattention.self.query.weight"));
    let frequency = (1..=layers).find(|frequency| (0..layers).all(|i| crossed(i) == (i % frequency == 0)));
    let frequency = frequency
        .ok_or_else(|| shapes.wrong("cross-attention is not in every n-th layer, beginning with the first".into()))?;
    let rows =
        |name: &str| if shapes.has(name) { shapes.axes(name).map(|[rows, _]: [i64; 2]| Some(rows)) } else { Ok(None) };
    let vocabulary = rows("Qformer.bert.embeddings.word_embeddings.weight")?.unwrap_or(VOCABULARY);
    let positions = match rows("Qformer.bert.embeddings.position_embeddings.weight")? {
        Some(positions) => positions,
        None if shapes.has(POSITION_IDS) => shapes.axes(POSITION_IDS).map(|[_, positions]: [i64; 2]| positions)?,
        None => POSITIONS,
    };
    let beside = shapes.beside(&["bert", "blip-2"])?;
    let described = beside.as_ref().map(|config| config.get("qformer_config").unwrap_or(config));
    let mut qformer = json!({
        "model_type": "blip_2_qformer",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": shapes.heads(described, width, QFORMER_HEAD_SIZE)?,
        "intermediate_size": intermediate,
        "encoder_hidden_size": image_width,
        "cross_attention_frequency": frequency,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    });
    for key in ["hidden_act", "layer_norm_eps"] {
        if let Some(value) = described.and_then(|config| config.get(key)) {
            qformer[key] = value.clone();
        }
    }
    let mut config = json!({"model_type": "blip-2", "num_query_tokens": queries, "qformer_config": qformer});
    if shapes.has("vision_proj.weight") {
        let [embedding, _] = shapes.axes("vision_proj.weight")?;
        config["image_text_hidden_size"] = json!(embedding);
    }
    if let Ok(vision) = checkpoint_vision(weights) {
        config["vision_config"] = vision;
    }
    Ok(config)
}

/// `vision_config` of a checkpoint in which the image encoder was trained too. Whoever takes only the Q-Former needs none.
///
/// # Errors
/// No image encoder, or one whose configuration does not follow from its shapes; see [`vit_config`].
pub(crate) fn checkpoint_vision(weights: &WeightsDir) -> Result<Value, WeightsError> {
    let shapes = Shapes::of(weights);
    if !shapes.has("visual_encoder.blocks.0.attn.qkv.weight") {
        return Err(
            shapes.wrong("this checkpoint of LAVIS holds no image encoder; give its folder or eva_vit_g.pth".into())
        );
    }
    let beside = shapes.beside(&["bert", "blip-2"])?;
    shapes.vit(VISUAL_ENCODER, beside.as_ref().and_then(|config| config.get("vision_config")))
}

/// `config.json` of the image encoder alone.
///
/// Heads are of width 88, unless a `config.json` beside the file, of a `blip_2_vision_model`, says how many there are. Of 40 blocks the last
/// is left out, as LAVIS does.
///
/// # Errors
/// As [`checkpoint_config`].
pub(crate) fn vit_config(weights: &WeightsDir) -> Result<Value, WeightsError> {
    let shapes = Shapes::of(weights);
    let beside = shapes.beside(&["blip_2_vision_model"])?;
    shapes.vit("", beside.as_ref())
}

struct Shapes<'a> {
    path: &'a Path,
    shapes: BTreeMap<String, Vec<i64>>,
}

impl<'a> Shapes<'a> {
    fn of(weights: &'a WeightsDir) -> Shapes<'a> {
        let shapes = weights.entries().into_iter().map(|(name, info)| (name, info.shape)).collect();
        Shapes { path: weights.path(), shapes }
    }

    fn wrong(&self, message: String) -> WeightsError {
        WeightsError::Lavis { path: self.path.to_path_buf(), message }
    }

    fn has(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    fn axes<const N: usize>(&self, name: &str) -> Result<[i64; N], WeightsError> {
        let shape = self.shapes.get(name).ok_or_else(|| self.wrong(format!("missing {name}")))?;
        let axes = shape.as_slice().try_into().ok().filter(|axes: &[i64; N]| axes.iter().all(|&size| size > 0));
        axes.ok_or_else(|| self.wrong(format!("{name}: expected {N} axes, none empty, got shape {shape:?}")))
    }

    /// How many modules there are below a prefix, which are numbered from 0 without a gap.
    fn count(&self, prefix: &str) -> Result<i64, WeightsError> {
        let numbers = self.shapes.keys().filter_map(|name| name.strip_prefix(prefix)?.split('.').next()?.parse().ok());
        let count = numbers.max().map_or(0, |last: i64| last.saturating_add(1));
        let numbered = |i: i64| {
            self.shapes
                .range(format!("{prefix}{i}.")..)
                .next()
                .is_some_and(|(name, _)| name.starts_with(&format!("{prefix}{i}.")))
        };
        // A number without a module ends the search early, whatever a name claims.
        match (0..count).find(|&i| !numbered(i)) {
            Some(gap) => Err(self.wrong(format!("{prefix}{gap} is missing, {prefix}{} is there", count - 1))),
            None if count == 0 => Err(self.wrong(format!("nothing below {prefix}"))),
            None if count > MAX_LAYERS => {
                Err(self.wrong(format!("{prefix}: expected at most {MAX_LAYERS} layers, got {count}")))
            }
            None => Ok(count),
        }
    }

    /// The `config.json` in the file's folder, which must be of a model that it can describe.
    fn beside(&self, model_types: &[&str]) -> Result<Option<Value>, WeightsError> {
        let path = self.path.with_file_name("config.json");
        if !path.exists() {
            return Ok(None);
        }
        let config = read_object(&path)?;
        let model_type = config.get("model_type").and_then(Value::as_str);
        if model_type.is_some_and(|model_type| model_types.contains(&model_type)) {
            return Ok(Some(config));
        }
        Err(WeightsError::Key {
            path,
            key: "model_type".into(),
            expected: format!("{} beside a file of LAVIS, or no config.json", model_types.join(" or ")),
            got: describe(config.get("model_type")),
        })
    }

    /// The number of attention heads, by a configuration or else by their usual width.
    fn heads(&self, described: Option<&Value>, width: i64, head_size: i64) -> Result<i64, WeightsError> {
        let Some(config) = described else {
            return if width % head_size == 0 {
                Ok(width / head_size)
            } else {
                Err(self.wrong(format!(
                    "how many attention heads? width {width} is no multiple of {head_size}; put a config.json with num_attention_heads and hidden_size beside the file"
                )))
            };
        };
        let key = |key: &str, expected: String| WeightsError::Key {
            path: self.path.with_file_name("config.json"),
            key: key.into(),
            expected,
            got: describe(config.get(key)),
        };
        if config.get("hidden_size").and_then(Value::as_i64) != Some(width) {
            return Err(key("hidden_size", format!("{width}, the width of {}", self.path.display())));
        }
        let heads =
            config.get("num_attention_heads").and_then(Value::as_i64).filter(|&heads| heads > 0 && width % heads == 0);
        heads.ok_or_else(|| key("num_attention_heads", format!("a divisor of {width}")))
    }

    fn vit(&self, prefix: &str, described: Option<&Value>) -> Result<Value, WeightsError> {
        let [_, tokens, width] = self.axes(&format!("{prefix}pos_embed"))?;
        let [_, _, patch, _] = self.axes(&format!("{prefix}patch_embed.proj.weight"))?;
        let [intermediate, _] = self.axes(&format!("{prefix}blocks.0.mlp.fc1.weight"))?;
        let blocks = self.count(&format!("{prefix}blocks."))?;
        let side = (tokens - 1).isqrt();
        if side * side != tokens - 1 || side == 0 {
            return Err(
                self.wrong(format!("{prefix}pos_embed: expected a square number of patches and one, got {tokens}"))
            );
        }
        let bias = ["q_bias", "qkv.bias"].iter().any(|bias| self.has(&format!("{prefix}blocks.0.attn.{bias}")));
        Ok(json!({
            "model_type": "blip_2_vision_model",
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": if blocks == VIT_G_BLOCKS { blocks - 1 } else { blocks },
            "num_attention_heads": self.heads(described, width, VIT_HEAD_SIZE)?,
            "image_size": side * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
            "qkv_bias": bias,
            "hidden_act": "gelu",
        }))
    }
}
