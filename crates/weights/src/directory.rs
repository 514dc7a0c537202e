//! A Hugging Face model directory and its parts under the names of our parameters.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2_torchx::params::{TensorInfo, TensorSource};
use serde_json::Value;
use tch::Tensor;

use crate::error::WeightsError;
use crate::json_file::{describe, read_object};
use crate::safetensors_dir::SafetensorsDir;

/// What a model directory holds, by its `model_type`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelKind {
    /// A whole BLIP-2 model: one of our exports or of Hugging Face's.
    WholeBlip2,
    /// One tower alone, with its `model_type`.
    Tower(String),
}

/// A part of BLIP-2 that can come from its own directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The frozen image encoder.
    Vision,
    /// The frozen language model.
    Language,
    /// The Q-Former with all that is trained around it (of a whole model), or the BERT it starts from.
    QFormer,
}

/// A `config.json` with the weights beside it.
pub struct ModelDir {
    path: PathBuf,
    config: Value,
    kind: ModelKind,
    weights: SafetensorsDir,
}

/// One part's configuration and tensors.
pub struct PartSource<'a> {
    /// `vision_config`, `text_config` or `qformer_config` of a whole model; the whole `config.json` of a tower.
    pub config: &'a Value,
    /// Its tensors under our names.
    pub weights: PartView<'a>,
}

/// Some tensors of a directory under other names.
pub struct PartView<'a> {
    weights: &'a SafetensorsDir,
    /// Our name to the file's.
    names: BTreeMap<String, String>,
}

impl ModelDir {
    /// Opens a directory with `config.json` and safetensors weights.
    ///
    /// # Errors
    /// No such directory, no `config.json`, invalid JSON, no `model_type`; whatever [`SafetensorsDir::open`] finds.
    pub fn open(path: &Path) -> Result<ModelDir, WeightsError> {
        let config_path = path.join("config.json");
        if !path.exists() {
            return Err(WeightsError::NotFound { path: path.to_path_buf() });
        }
        if !config_path.exists() {
            return Err(WeightsError::NoConfig { path: path.to_path_buf() });
        }
        let config = read_object(&config_path)?;
        let kind = match config.get("model_type") {
            Some(Value::String(t)) if t == "blip-2" => ModelKind::WholeBlip2,
            Some(Value::String(t)) => ModelKind::Tower(t.clone()),
            other => {
                return Err(WeightsError::Key {
                    path: config_path,
                    key: "model_type".into(),
                    expected: "a string".into(),
                    got: describe(other),
                });
            }
        };
        Ok(ModelDir { weights: SafetensorsDir::open(path)?, path: path.to_path_buf(), config, kind })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Whether it is a whole BLIP-2 or a tower.
    pub fn kind(&self) -> &ModelKind {
        &self.kind
    }

    /// All tensors under the file's own names.
    pub fn weights(&self) -> &SafetensorsDir {
        &self.weights
    }

    /// One part: its configuration, and its tensors under our names.
    ///
    /// Of a whole BLIP-2 model the vision part is what lies below `vision_model.` but `post_layernorm`, which is trained and so belongs
    /// to [`Part::QFormer`]. A tower's tensors get our prefix (`vision_model.`, `language_model.`), those of a BERT none; prefixes
    /// that some classes put in front (`dinov2.`, `bert.`) are taken off, and BERT's old `LayerNorm.gamma`, `LayerNorm.beta` become
    /// `weight`, `bias`.
    ///
    /// # Errors
    /// The directory has no such part; its configuration is missing; two tensors become one name.
    pub fn part(&self, part: Part) -> Result<PartSource<'_>, WeightsError> {
        let layout = match &self.kind {
            ModelKind::WholeBlip2 => None,
            ModelKind::Tower(model_type) => {
                let layout = Layout::of(part, model_type);
                Some(layout.ok_or_else(|| WeightsError::NoPart {
                    path: self.path.clone(),
                    part: part.label(),
                    model_type: model_type.clone(),
                    supported: Layout::supported(part),
                })?)
            }
        };
        let config = if layout.is_some() { &self.config } else { self.section(part)? };
        let mut names = BTreeMap::new();
        for theirs in self.weights.names() {
            let ours = match layout {
                Some(layout) => layout.our_name(theirs),
                None if part.owns(theirs) => theirs.to_string(),
                None => continue,
            };
            if let Some(first) = names.insert(ours.clone(), theirs.to_string()) {
                let second = theirs.to_string();
                return Err(WeightsError::RepeatedTensor { path: self.path.clone(), name: ours, first, second });
            }
        }
        Ok(PartSource { config, weights: PartView { weights: &self.weights, names } })
    }

    fn section(&self, part: Part) -> Result<&Value, WeightsError> {
        let key = match part {
            Part::Vision => "vision_config",
            Part::Language => "text_config",
            Part::QFormer => "qformer_config",
        };
        match self.config.get(key) {
            Some(section @ Value::Object(_)) => Ok(section),
            other => Err(WeightsError::Key {
                path: self.path.join("config.json"),
                key: key.into(),
                expected: "an object".into(),
                got: describe(other),
            }),
        }
    }
}

impl Part {
    fn label(self) -> &'static str {
        match self {
            Part::Vision => "image encoder",
            Part::Language => "language model",
            Part::QFormer => "Q-Former or BERT",
        }
    }

    /// Whether a whole model's tensor belongs to this part.
    fn owns(self, name: &str) -> bool {
        let owner = if name.starts_with("vision_model.post_layernorm.") {
            Part::QFormer
        } else if name.starts_with("vision_model.") {
            Part::Vision
        } else if name.starts_with("language_model.") {
            Part::Language
        } else {
            Part::QFormer
        };
        self == owner
    }
}

impl TensorSource for PartView<'_> {
    fn origin(&self) -> String {
        self.weights.origin()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        let infos: BTreeMap<String, TensorInfo> = self.weights.entries().into_iter().collect();
        let names = self.names.iter();
        names.filter_map(|(ours, theirs)| Some((ours.clone(), infos.get(theirs)?.clone()))).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        self.weights.read(self.names.get(name).ok_or("no such tensor")?)
    }
}

/// How a family of models names its tensors when it stands alone. A new tower is a new row of [`LAYOUTS`].
struct Layout {
    model_type: &'static str,
    part: Part,
    /// What stands in front of the base model's names in files of classes with a head; a base model's own file lacks it.
    base_prefix: &'static str,
    /// Top-level names of those heads.
    heads: &'static [&'static str],
    /// What our store puts in front of the base model's names.
    our_base: &'static str,
    /// What it puts in front of the heads' names.
    our_head: &'static str,
}

const LAYOUTS: [Layout; 5] = [
    Layout {
        model_type: "blip_2_vision_model",
        part: Part::Vision,
        base_prefix: "vision_model.",
        heads: &[],
        our_base: "vision_model.",
        our_head: "vision_model.",
    },
    Layout {
        model_type: "dinov2",
        part: Part::Vision,
        base_prefix: "dinov2.",
        heads: &["classifier."],
        our_base: "vision_model.",
        our_head: "vision_model.",
    },
    Layout {
        model_type: "bert",
        part: Part::QFormer,
        base_prefix: "bert.",
        heads: &["cls."],
        our_base: "",
        our_head: "",
    },
    Layout {
        model_type: "llama",
        part: Part::Language,
        base_prefix: "model.",
        heads: &["lm_head."],
        our_base: "language_model.model.",
        our_head: "language_model.",
    },
    Layout {
        model_type: "t5",
        part: Part::Language,
        base_prefix: "",
        heads: &[],
        our_base: "language_model.",
        our_head: "language_model.",
    },
];

impl Layout {
    fn of(part: Part, model_type: &str) -> Option<&'static Layout> {
        LAYOUTS.iter().find(|layout| layout.part == part && layout.model_type == model_type)
    }

    fn supported(part: Part) -> String {
        let towers = LAYOUTS.iter().filter(|layout| layout.part == part).map(|layout| layout.model_type);
        towers.chain(["blip-2"]).collect::<Vec<_>>().join(", ")
    }

    fn our_name(&self, theirs: &str) -> String {
        if self.heads.iter().any(|head| theirs.starts_with(head)) {
            return self.spelled(format!("{}{theirs}", self.our_head));
        }
        let base = theirs.strip_prefix(self.base_prefix).unwrap_or(theirs);
        self.spelled(format!("{}{base}", self.our_base))
    }

    /// BERT files that were converted from TensorFlow call the LayerNorms' parameters gamma and beta.
    fn spelled(&self, name: String) -> String {
        match (name.strip_suffix("LayerNorm.gamma"), name.strip_suffix("LayerNorm.beta")) {
            (Some(module), _) if self.part == Part::QFormer => format!("{module}LayerNorm.weight"),
            (_, Some(module)) if self.part == Part::QFormer => format!("{module}LayerNorm.bias"),
            _ => name,
        }
    }
}
