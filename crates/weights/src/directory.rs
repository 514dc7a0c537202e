//! A Hugging Face model directory, or a file of LAVIS, and its parts under the names of our parameters.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::WeightsError;
use crate::frozen_elsewhere::{FROZEN_KEY, FrozenElsewhere, frozen_elsewhere};
use crate::json_file::{describe, read_object};
use crate::lavis;
use crate::part_view::{PartView, Recipe};
use crate::weights_dir::WeightsDir;
use crate::weights_file::WeightsFile;

/// What a model directory holds, by its `model_type`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelKind {
    /// A whole BLIP-2 model: one of our exports or of Hugging Face's.
    WholeBlip2,
    /// One tower alone, with its `model_type`.
    Tower(String),
    /// A `.pth` of LAVIS: what its stage 1 or 2 trained.
    LavisCheckpoint,
    /// A `.pth` of LAVIS' image encoder.
    LavisVit,
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

/// A `config.json` with the weights beside it; of a file of LAVIS, the configuration that its shapes imply.
pub struct ModelDir {
    path: PathBuf,
    config: Value,
    kind: ModelKind,
    weights: WeightsDir,
    /// Frozen towers of an export of trained weights alone, opened when they are asked for.
    frozen: Vec<(FrozenElsewhere, OnceCell<Box<ModelDir>>)>,
}

/// One part's configuration and tensors.
pub struct PartSource<'a> {
    /// `vision_config`, `text_config` or `qformer_config` of a whole model; the whole `config.json` of a tower.
    pub config: &'a Value,
    /// Its tensors under our names.
    pub weights: PartView<'a>,
}

impl ModelDir {
    /// Opens a directory with `config.json` and weights, or a `.pth` of LAVIS (a checkpoint of stage 1 or 2, or `eva_vit_g.pth`).
    ///
    /// # Errors
    /// No such directory, no `config.json`, invalid JSON, no `model_type`; whatever [`WeightsDir::open`] finds; a file that is not of LAVIS.
    pub fn open(path: &Path) -> Result<ModelDir, WeightsError> {
        let config_path = path.join("config.json");
        if !path.exists() {
            return Err(WeightsError::NotFound { path: path.to_path_buf() });
        }
        if path.is_file() {
            return ModelDir::open_lavis(path);
        }
        if !config_path.exists() {
            return Err(WeightsError::NoConfig { path: path.to_path_buf() });
        }
        let mut config = read_object(&config_path)?;
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
        name_vision_section(&mut config, &kind);
        let frozen = frozen_elsewhere(path, &config)?.into_iter().map(|named| (named, OnceCell::new())).collect();
        Ok(ModelDir { weights: WeightsDir::open(path)?, path: path.to_path_buf(), config, kind, frozen })
    }

    fn open_lavis(path: &Path) -> Result<ModelDir, WeightsError> {
        if !path.extension().is_some_and(|extension| extension == "pth" || extension == "pt") {
            return Err(WeightsError::FileForDirectory { path: path.to_path_buf() });
        }
        let weights = WeightsDir::of(path, vec![WeightsFile::open(path)?])?;
        let (kind, config) = match lavis::kind_of(&weights)? {
            lavis::Kind::Checkpoint => (ModelKind::LavisCheckpoint, lavis::checkpoint_config(&weights)?),
            lavis::Kind::Vit => (ModelKind::LavisVit, lavis::vit_config(&weights)?),
        };
        Ok(ModelDir { path: path.to_path_buf(), config, kind, weights, frozen: Vec::new() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole `config.json`. In the directory of an image-text model (CLIP, SigLIP, AIMv2) `vision_config` has its `model_type` even
    /// where the file leaves it to the class.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Whether it is a whole BLIP-2 or a tower.
    pub fn kind(&self) -> &ModelKind {
        &self.kind
    }

    /// All tensors under the file's own names.
    pub fn weights(&self) -> &WeightsDir {
        &self.weights
    }

    /// Where a frozen tower lies that this directory names instead of holding it.
    pub fn frozen_elsewhere(&self, part: Part) -> Option<&FrozenElsewhere> {
        self.frozen.iter().map(|(elsewhere, _)| elsewhere).find(|elsewhere| elsewhere.part == part)
    }

    /// The directory of a frozen tower that this one names.
    ///
    /// # Errors
    /// It is not where it should be, or cannot be opened.
    pub fn open_elsewhere(&self, part: Part) -> Result<Option<&ModelDir>, WeightsError> {
        let Some((elsewhere, opened)) = self.frozen.iter().find(|(elsewhere, _)| elsewhere.part == part) else {
            return Ok(None);
        };
        if opened.get().is_none() {
            if !elsewhere.path.exists() {
                return Err(WeightsError::FrozenGone {
                    path: self.path.join("config.json"),
                    key: format!("{FROZEN_KEY}.{}.path", part.key()),
                    part: part.label(),
                    got: elsewhere.path.clone(),
                    source_name: elsewhere.source.clone(),
                });
            }
            let tower = ModelDir::open(&elsewhere.path)?;
            // It could name this directory, and so on for ever.
            if tower.frozen_elsewhere(part).is_some() {
                return Err(WeightsError::Key {
                    path: self.path.join("config.json"),
                    key: format!("{FROZEN_KEY}.{}.path", part.key()),
                    expected: format!("a folder that holds the {}", part.label()),
                    got: format!("{}, which names another in turn", elsewhere.path.display()),
                });
            }
            let _ = opened.set(Box::new(tower));
        }
        Ok(opened.get().map(|dir| &**dir))
    }

    /// One part: its configuration, and its tensors under our names. A frozen tower that the directory names instead of holding it is
    /// completed from there.
    ///
    /// Of a whole BLIP-2 model the vision part is what lies below `vision_model.` but `post_layernorm`, which is trained and so belongs
    /// to [`Part::QFormer`]. A tower's tensors get our prefix (`vision_model.`, `language_model.`), those of a BERT none; prefixes
    /// that some classes put in front (`dinov2.`, `bert.`) are taken off, and BERT's old `LayerNorm.gamma`, `LayerNorm.beta` become
    /// `weight`, `bias`. The vision part of an image-text model is its `vision_config` with all of its tensors; those of its text half keep
    /// their names. A `vision_model.post_layernorm` in a tower's vision part is that tower's final norm and never ln_vision.
    ///
    /// Of LAVIS' checkpoint, [`Part::QFormer`] is all of it, and what has no name of ours keeps its own; [`Part::Vision`] its
    /// `visual_encoder.`, where it has one.
    ///
    /// # Errors
    /// The directory has no such part; its configuration is missing; two tensors become one name.
    pub fn part(&self, part: Part) -> Result<PartSource<'_>, WeightsError> {
        if let Some(elsewhere) = self.open_elsewhere(part)? {
            return Ok(PartSource { config: self.section(part)?, weights: elsewhere.part(part)?.weights });
        }
        let names = self.weights.names();
        let (config, recipes) = match (&self.kind, part) {
            (ModelKind::WholeBlip2, _) => {
                let config = self.section(part)?;
                (config, self.renamed(names.filter(|name| part.owns(name)).map(|name| (name.to_string(), name)))?)
            }
            (ModelKind::Tower(model_type), _) => {
                let layout = Layout::of(part, model_type).ok_or_else(|| WeightsError::NoPart {
                    path: self.path.clone(),
                    part: part.label(),
                    model_type: model_type.clone(),
                    supported: Layout::supported(part),
                })?;
                let of_parts = part == Part::Vision && image_text_vision(model_type).is_some();
                let config = if of_parts { self.section(part)? } else { &self.config };
                (config, self.renamed(names.map(|name| (layout.our_name(name), name)))?)
            }
            (ModelKind::LavisCheckpoint, Part::QFormer) => {
                let ours = |name: &str| lavis::our_name(name).unwrap_or_else(|| name.to_string());
                (self.section(part)?, self.renamed(names.map(|name| (ours(name), name)))?)
            }
            (ModelKind::LavisCheckpoint, Part::Vision) => {
                lavis::checkpoint_vision(&self.weights)?;
                (self.section(part)?, lavis::vit_recipes(names, lavis::VISUAL_ENCODER))
            }
            (ModelKind::LavisVit, Part::Vision) => (&self.config, lavis::vit_recipes(names, "")),
            (ModelKind::LavisCheckpoint, Part::Language) | (ModelKind::LavisVit, _) => {
                let message = format!("this file of LAVIS holds no {}; give a Hugging Face directory", part.label());
                return Err(WeightsError::Lavis { path: self.path.clone(), message });
            }
        };
        Ok(PartSource { config, weights: PartView::new(&self.weights, recipes) })
    }

    /// Tensors by our names; each may come once.
    fn renamed<'a>(
        &self,
        names: impl Iterator<Item = (String, &'a str)>,
    ) -> Result<BTreeMap<String, Recipe>, WeightsError> {
        let mut recipes = BTreeMap::new();
        for (ours, theirs) in names {
            if let Some(first) = recipes.insert(ours.clone(), Recipe::Tensor(theirs.to_string())) {
                let (first, second) = (first.ingredients(), theirs.to_string());
                return Err(WeightsError::RepeatedTensor { path: self.path.clone(), name: ours, first, second });
            }
        }
        Ok(recipes)
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
    /// Its key in `frozen_weights`.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Part::Vision => "vision",
            Part::Language => "language",
            Part::QFormer => "qformer",
        }
    }

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

/// What the text half of an image-text model and what joins the halves are called.
const TEXT_HALF: &[&str] = &["text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias"];

/// Image-text models, by what their image encoder is called.
const IMAGE_TEXT: [(&str, &str); 3] =
    [("aimv2", "aimv2_vision_model"), ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")];

/// The row of [`LAYOUTS`] of a tower whose classes put `base_prefix` in front.
const fn vision_tower(
    model_type: &'static str,
    base_prefix: &'static str,
    heads: &'static [&'static str],
    our_head: &'static str,
) -> Layout {
    Layout { model_type, part: Part::Vision, base_prefix, heads, our_base: "vision_model.", our_head }
}

const LAYOUTS: &[Layout] = &[
    vision_tower("aimv2_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("blip_2_vision_model", "vision_model.", &[], "vision_model."),
    vision_tower("clip_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("dinov2", "dinov2.", &["classifier."], "vision_model."),
    vision_tower("dinov2_with_registers", "dinov2_with_registers.", &["classifier."], "vision_model."),
    vision_tower("dinov3_vit", "dinov3_vit.", &[], "vision_model."),
    vision_tower("siglip_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("vit", "vit.", &["classifier.", "decoder."], "vision_model."),
    Layout {
        model_type: "bert",
        part: Part::QFormer,
        base_prefix: "bert.",
        heads: &["cls."],
        our_base: "",
        our_head: "",
    },
    decoder("llama"),
    decoder("mistral"),
    decoder("qwen2"),
    decoder("qwen3"),
    decoder("smollm3"),
    decoder("phi3"),
    decoder("gemma"),
    decoder("gemma2"),
    decoder("gemma3_text"),
    // OPT's base model lies below `decoder.`, which is part of its names.
    decoder("opt"),
    Layout { base_prefix: "transformer.", our_base: "language_model.transformer.", ..decoder("gpt2") },
    Layout { base_prefix: "", heads: &[], our_base: "language_model.", ..decoder("t5") },
];

/// Most decoders: the base model below `model.`, the head beside it.
const fn decoder(model_type: &'static str) -> Layout {
    Layout {
        model_type,
        part: Part::Language,
        base_prefix: "model.",
        heads: &["lm_head."],
        our_base: "language_model.model.",
        our_head: "language_model.",
    }
}

/// What an image-text model's image encoder is called.
fn image_text_vision(model_type: &str) -> Option<&'static str> {
    IMAGE_TEXT.iter().find(|(whole, _)| *whole == model_type).map(|(_, vision)| *vision)
}

/// Writes into an image-text model's `vision_config` what its class takes for granted.
fn name_vision_section(config: &mut Value, kind: &ModelKind) {
    let ModelKind::Tower(model_type) = kind else { return };
    let section = config.get_mut("vision_config").and_then(Value::as_object_mut);
    if let (Some(vision), Some(section)) = (image_text_vision(model_type), section) {
        section.entry("model_type").or_insert_with(|| vision.into());
    }
}

impl Layout {
    fn of(part: Part, model_type: &str) -> Option<&'static Layout> {
        let model_type = match part {
            Part::Vision => image_text_vision(model_type).unwrap_or(model_type),
            Part::Language | Part::QFormer => model_type,
        };
        LAYOUTS.iter().find(|layout| layout.part == part && layout.model_type == model_type)
    }

    fn supported(part: Part) -> String {
        let towers = LAYOUTS.iter().filter(|layout| layout.part == part).map(|layout| layout.model_type);
        let whole = IMAGE_TEXT.iter().map(|(whole, _)| *whole).filter(|_| part == Part::Vision);
        let supported = towers.chain(whole).chain(["blip-2"]).collect::<Vec<_>>().join(", ");
        match part {
            Part::Vision => {
                format!("{supported} (SigLIP 2 by its checkpoints of fixed resolution, whose model_type is siglip)")
            }
            Part::Language | Part::QFormer => supported,
        }
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
