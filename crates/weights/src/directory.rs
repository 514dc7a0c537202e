//! A Hugging Face model directory, or a file of LAVIS, and its parts under the names of our parameters.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::WeightsError;
use crate::frozen_elsewhere::{FROZEN_KEY, FrozenElsewhere, frozen_elsewhere};
use crate::json_file::{describe, read_object};
use crate::lavis;
use crate::layouts::{Layout, has_section, in_language_model, name_sections};
use crate::part_view::{PartView, Recipe};
use crate::tied_head::has_own_head;
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
    /// `config` where a T5's head is its own though the file calls it tied; none where the file is right. Found when the language model is asked
    /// for, since two large tensors are compared.
    corrected: OnceCell<Option<Value>>,
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
        if let ModelKind::Tower(model_type) = &kind {
            name_sections(&mut config, model_type);
        }
        let frozen = frozen_elsewhere(path, &config)?.into_iter().map(|named| (named, OnceCell::new())).collect();
        let (path, weights) = (path.to_path_buf(), WeightsDir::open(path)?);
        Ok(ModelDir { path, config, kind, weights, corrected: OnceCell::new(), frozen })
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
        let path = path.to_path_buf();
        Ok(ModelDir { path, config, kind, weights, corrected: OnceCell::new(), frozen: Vec::new() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole `config.json`. In the directory of a model of several parts (CLIP, SigLIP, AIMv2; LLaVA, Gemma 3) the section that is used has
    /// its `model_type` even where the file leaves it to the class; of CLIP it is what its class makes of `vision_config_dict`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The same for whoever reads the language model too: a T5 that was saved with a head of its own has `tie_word_embeddings: false`, whatever
    /// the version that saved it. A head that the file calls tied is compared with the embedding, once.
    ///
    /// # Errors
    /// A head that is not the embedding, in a model that has no other way to say so; tensors that cannot be read.
    pub fn corrected_config(&self) -> Result<&Value, WeightsError> {
        if self.corrected.get().is_none() {
            let own = match self.part_as_configured(Part::Language) {
                Ok(part) if self.frozen_elsewhere(Part::Language).is_none() => has_own_head(&part)?,
                // The folder that holds the model looks itself; and who asks for a part that is not there will hear about it.
                _ => false,
            };
            let corrected = own.then(|| {
                let mut config = self.config.clone();
                let section = match self.language_section() {
                    None => Some(&mut config),
                    Some(key) => config.get_mut(key),
                };
                section.into_iter().for_each(|section| section["tie_word_embeddings"] = false.into());
                config
            });
            let _ = self.corrected.set(corrected);
        }
        Ok(self.corrected.get().and_then(Option::as_ref).unwrap_or(&self.config))
    }

    /// Where the language model's configuration stands; `None` where it is all of the file.
    fn language_section(&self) -> Option<&'static str> {
        match &self.kind {
            ModelKind::Tower(model_type) if !has_section(model_type, Part::Language) => None,
            _ => Some(Part::Language.section()),
        }
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

    /// Looks for a frozen tower that this directory names in another folder than it says.
    pub fn take_from(&mut self, part: Part, folder: PathBuf) {
        for (elsewhere, opened) in self.frozen.iter_mut().filter(|(elsewhere, _)| elsewhere.part == part) {
            elsewhere.path = folder.clone();
            opened.take();
        }
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
    /// their names; the language part of a chat model that sees (LLaVA, Gemma 3, Mistral 3) is its `text_config` with what lies below
    /// `language_model.` alone. A `vision_model.post_layernorm` in a tower's vision part is that tower's final norm and never ln_vision.
    ///
    /// Of LAVIS' checkpoint, [`Part::QFormer`] is all of it, and what has no name of ours keeps its own; [`Part::Vision`] its
    /// `visual_encoder.`, where it has one.
    ///
    /// # Errors
    /// The directory has no such part; its configuration is missing; two tensors become one name. Of the language model also what
    /// [`ModelDir::corrected_config`] finds.
    pub fn part(&self, part: Part) -> Result<PartSource<'_>, WeightsError> {
        let mut source = self.part_as_configured(part)?;
        if part == Part::Language {
            let config = self.corrected_config()?;
            source.config = self.language_section().map_or(config, |key| &config[key]);
        }
        Ok(source)
    }

    fn part_as_configured(&self, part: Part) -> Result<PartSource<'_>, WeightsError> {
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
                let within = has_section(model_type, part);
                let config = if within { self.section(part)? } else { &self.config };
                let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or(model_type);
                let layout = Layout::of(part, model_type).ok_or_else(|| WeightsError::NoPart {
                    path: self.path.clone(),
                    part: part.label(),
                    model_type: model_type.to_string(),
                    supported: Layout::supported(part),
                })?;
                let alone = |name| if within && part == Part::Language { in_language_model(name) } else { Some(name) };
                (config, self.renamed(names.filter_map(|name| Some((layout.our_name(alone(name)?), name))))?)
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
        let key = part.section();
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
    /// The section of a whole model's `config.json` that describes it.
    pub(crate) fn section(self) -> &'static str {
        match self {
            Part::Vision => "vision_config",
            Part::Language => "text_config",
            Part::QFormer => "qformer_config",
        }
    }

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
