//! A whole BLIP-2 directory (an export, a golden case, a hub download) as models with their weights.

use std::path::{Path, PathBuf};

use blip2_data::TextEncoder;
use blip2_model::dropout::DropoutRates;
use blip2_model::language::{LanguageConfig, LanguageModel};
use blip2_model::{Blip2Config, Frozen, Stage1, Stage2};
use blip2_torchx::params::{LoadPlan, ParamStore};
use blip2_weights::{ModelDir, ModelKind, Part, plans};
use tch::{Device, Kind};

use crate::assembly::declared;
use crate::assembly::loading::{IMAGE_ENCODER, LANGUAGE_MODEL, LoadedPart, fill};
use crate::assembly::preprocessing::Preprocessing;
use crate::config::{AutoOr, WeightsSource};
use crate::error::Error;
use crate::export::verify_towers;
use crate::features::encoder::ImageEncoder;
use crate::task::stage1::Stage1Options;
use crate::task::{Stage1Task, Stage2Task};

/// An opened directory with its configuration.
pub struct ModelFiles {
    dir: ModelDir,
    /// What `config.json` says.
    pub config: Blip2Config,
    /// How pictures become its pixels.
    pub preprocessing: Preprocessing,
}

impl ModelFiles {
    /// Opens a directory that holds a whole BLIP-2 model.
    ///
    /// # Errors
    /// Files that are missing or damaged, a tower alone, values that no code of ours computes.
    pub fn open(source: impl Into<WeightsSource>) -> Result<ModelFiles, Error> {
        let source = source.into();
        let (dir, path) = (source.open()?, &*source);
        let message = match dir.kind() {
            ModelKind::WholeBlip2 => None,
            ModelKind::Tower(model_type) => {
                Some(format!("model_type: expected a whole model, blip-2, got {model_type}"))
            }
            ModelKind::LavisCheckpoint | ModelKind::LavisVit => {
                Some("expected a whole model, got a file of LAVIS, which holds one part of it".to_string())
            }
        };
        if let Some(message) = message {
            return Err(Error::file(path, format!("{message}; give an export's directory")));
        }
        verify_towers(&dir)?;
        let config = Blip2Config::from_json(dir.corrected_config()?)
            .map_err(|source| Error::Model { path: path.into(), source })?;
        let preprocessing = Preprocessing::of(path, &config.vision, &AutoOr::Auto)?;
        Ok(ModelFiles { dir, config, preprocessing })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The frozen image encoder, stored in `kind`.
    ///
    /// # Errors
    /// Tensors that are missing, unexpected or misshapen.
    pub fn image_encoder(&self, device: Device, kind: Kind) -> Result<ImageEncoder, Error> {
        let depth = self
            .config
            .vision
            .depth(self.config.top.vision_feature_layer.or(Some(-1)))
            .map_err(|source| Error::Model { path: self.path().into(), source })?;
        load_image_encoder(&self.dir, &self.config.vision, depth, self.preprocessing.clone(), device, kind)
            .map(|(encoder, _)| encoder)
    }

    /// Stage 1 with its weights.
    ///
    /// # Errors
    /// Tensors that are missing, unexpected or misshapen.
    pub fn stage1_task(&self, device: Device, options: Stage1Options) -> Result<Stage1Task, Error> {
        let source = self.dir.part(Part::QFormer)?.weights;
        declared::compare(&declared::trained(&self.config, None), &source, &LoadPlan::exact())?;
        let params = ParamStore::trainable(device);
        let model = Stage1::new(&params.root(), &self.config);
        params.load(&source, &LoadPlan::exact())?;
        Ok(Stage1Task { model, params, options })
    }

    /// Stage 2 with its weights, the language model stored in `kind`.
    ///
    /// # Errors
    /// A stage-1 directory, tensors that are missing, unexpected or misshapen.
    pub fn stage2_task(&self, device: Device, kind: Kind) -> Result<Stage2Task, Error> {
        let Some(language_config) = &self.config.language else {
            return Err(Error::file(
                self.path().join("config.json"),
                "architectures: expected Blip2ForConditionalGeneration (a stage-2 model), got Blip2ForImageTextRetrieval",
            ));
        };
        let (source, width) = (self.dir.part(Part::QFormer)?.weights, language_config.hidden_size());
        declared::compare(&declared::trained(&self.config, Some(width)), &source, &LoadPlan::exact())?;
        let params = ParamStore::trainable(device);
        let before = self.config.top.before_queries.clone().unwrap_or_default();
        let model = Stage2::new(&params.root(), &self.config, width, before);
        params.load(&source, &LoadPlan::exact())?;
        let (language, _) = load_language_model(&self.dir, language_config, device, kind)?;
        Ok(Stage2Task {
            model,
            params,
            language,
            language_dropout: DropoutRates::default(),
            prompt: Vec::new(),
            untargeted: 0,
            vocabulary: language_config.vocab_size() as usize,
            end_tokens: language_config.eos_token_ids(),
        })
    }

    /// The tokenizer beside the weights.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn tokenizer(&self, max_tokens: usize, add_special_tokens: bool) -> Result<TextEncoder, Error> {
        let file: PathBuf = self.path().join("tokenizer.json");
        Ok(TextEncoder::from_file(&file, max_tokens, add_special_tokens)?)
    }
}

/// Builds and fills the first `depth` blocks of a tower.
///
/// # Errors
/// Tensors that are missing, unexpected or misshapen.
pub fn load_image_encoder(
    dir: &ModelDir,
    config: &blip2_model::vision::VisionConfig,
    depth: i64,
    preprocessing: Preprocessing,
    device: Device,
    kind: Kind,
) -> Result<(ImageEncoder, LoadedPart), Error> {
    let (source, plan) = (dir.part(Part::Vision)?.weights, plans::vision_tower(depth as usize));
    declared::compare(&declared::image_encoder(config, depth), &source, &plan)?;
    let tower = Frozen::build(device, kind, |root| config.build(&root.pp("vision_model"), depth));
    let mut loaded = fill(IMAGE_ENCODER, tower.params(), &source, &plan)?;
    loaded.pixels = Some(preprocessing.origin());
    let identity = format!("{} {depth} {kind:?}", dir.path().display());
    Ok((ImageEncoder::new(tower, config.clone(), depth, preprocessing, identity), loaded))
}

/// Builds and fills the language model that `config` describes.
///
/// # Errors
/// Tensors that are missing, unexpected or misshapen.
pub fn load_language_model(
    dir: &ModelDir,
    config: &LanguageConfig,
    device: Device,
    kind: Kind,
) -> Result<(Frozen<LanguageModel>, LoadedPart), Error> {
    let part = dir.part(Part::Language)?;
    let plan = plans::language_model(plans::tied_head(part.config));
    declared::compare(&declared::language_model(config), &part.weights, &plan)?;
    let model = Frozen::build(device, kind, |root| config.build(&root.pp("language_model")));
    let loaded = fill(LANGUAGE_MODEL, model.params(), &part.weights, &plan)?;
    Ok((model, loaded))
}
