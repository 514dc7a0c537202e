//! From a configuration to models with their weights: what a stage is made of before its first step.

pub mod blueprint;
pub(crate) mod declared;
pub(crate) mod language;
pub(crate) mod loading;
pub mod model_files;
pub mod preprocessing;
mod qformer_init;
mod vision_layer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2_data::{SpecialTokens, TextEncoder};
use blip2_model::{Stage1, Stage2};
use blip2_torchx::params::ParamStore;
use blip2_weights::Part;
use serde_json::Value;
use tch::Device;

use crate::assembly::blueprint::Blueprint;
use crate::assembly::language::LanguagePlan;
use crate::assembly::loading::{LoadedPart, QFORMER, fill};
use crate::assembly::model_files::{load_image_encoder, load_language_model};
use crate::config::{Config, Contrastive, NegativeSamples, Stage};
use crate::data::text::TextFrame;
use crate::error::Error;
use crate::features::encoder::ImageEncoder;
use crate::task::stage1::Stage1Options;
use crate::task::{Stage1Task, Stage2Task, Task};

/// A stage, ready to train.
pub struct Assembly {
    /// The frozen image encoder.
    pub encoder: ImageEncoder,
    /// The model with its losses.
    pub task: Box<dyn Task>,
    /// Captions to ids.
    pub text: TextFrame,
    /// The folder of the tokenizer's files.
    pub tokenizer: PathBuf,
    /// `config.json` of the model, as a checkpoint keeps it.
    pub model_json: Value,
    /// What became of the initial weights' tensors, part by part.
    pub loaded: Vec<LoadedPart>,
}

impl Assembly {
    /// Builds the stage that `config` and its blueprint describe, and fills it.
    ///
    /// # Errors
    /// Tensors that cannot be read, a tokenizer that does not suit the model.
    pub fn build(config: &Config, mut blueprint: Blueprint, device: Device) -> Result<Assembly, Error> {
        tch::manual_seed(config.run.seed as i64);
        let built = match blueprint.language.take() {
            None => build_stage1(config, &blueprint, device)?,
            Some(language) => build_stage2(&blueprint, language, device)?,
        };
        let Blueprint { vision_dir, vision, depth, preprocessing, model_json, vision_dtype, .. } = blueprint;
        let (encoder, tower) = load_image_encoder(&vision_dir, &vision, depth, preprocessing, device, vision_dtype)?;
        let Built { task, text, tokenizer, mut loaded } = built;
        loaded.insert(0, tower);
        Ok(Assembly { encoder, task, text, tokenizer, model_json, loaded })
    }

    /// The frozen towers by name.
    pub fn frozen(&self) -> Vec<(&'static str, &ParamStore)> {
        let language = self.task.frozen().map(|params| ("language model", params));
        std::iter::once(("image encoder", self.encoder.params())).chain(language).collect()
    }
}

struct Built {
    task: Box<dyn Task>,
    text: TextFrame,
    tokenizer: PathBuf,
    loaded: Vec<LoadedPart>,
}

/// Fills what a stage trains from what the Q-Former starts from.
fn fill_trained(blueprint: &Blueprint, stage: Stage, params: &ParamStore) -> Result<LoadedPart, Error> {
    let part = blueprint.init.dir.part(Part::QFormer)?;
    fill(QFORMER, params, &part.weights, &blueprint.init.plan(stage, &part.weights)?)
}

fn build_stage1(config: &Config, blueprint: &Blueprint, device: Device) -> Result<Built, Error> {
    let params = ParamStore::trainable(device);
    let model = Stage1::new(&params.root(), &blueprint.model);
    let loaded = vec![fill_trained(blueprint, Stage::One, &params)?];
    let max = blueprint.model.qformer.max_position_embeddings as usize;
    if config.task.max_text_tokens > max {
        return Err(Error::Mismatch(format!(
            "task.max_text_tokens: expected at most the Q-Former's max_position_embeddings of {max}, got {}",
            config.task.max_text_tokens
        )));
    }
    let encoder = TextEncoder::from_folder(&blueprint.init.tokenizer, config.task.max_text_tokens, true)?;
    let ids = encoder.vocab_size() as i64;
    if ids > blueprint.model.qformer.vocab_size {
        return Err(Error::Mismatch(format!(
            "{}: the tokenizer has {ids} tokens, the model's vocabulary {}",
            blueprint.init.tokenizer.display(),
            blueprint.model.qformer.vocab_size
        )));
    }
    let pad = pad_id(&blueprint.init.tokenizer, &encoder)?;
    let weights = &config.task.losses;
    let options = Stage1Options {
        itc: weights.itc,
        itm: weights.itm,
        itg: weights.itg,
        label_smoothing: config.task.label_smoothing,
        itm_weight_floor: config.task.itm_weight_floor,
        cached: config.task.contrastive == Contrastive::Cached && config.schedule.micro_batch.is_some(),
        local_negatives: config.task.negatives == NegativeSamples::Local,
    };
    let (text, tokenizer) = (TextFrame::plain(Arc::new(encoder), pad), blueprint.init.tokenizer.clone());
    Ok(Built { task: Box::new(Stage1Task { model, params, options }), text, tokenizer, loaded })
}

fn build_stage2(blueprint: &Blueprint, language: LanguagePlan, device: Device) -> Result<Built, Error> {
    let params = ParamStore::trainable(device);
    let before = language.before_queries.clone().unwrap_or_default();
    let model = Stage2::new(&params.root(), &blueprint.model, language.config.hidden_size(), before);
    let trained = fill_trained(blueprint, Stage::Two, &params)?;
    let (frozen, of_language) = load_language_model(&language.dir, &language.config, device, language.dtype)?;
    let task = Stage2Task {
        model,
        params,
        language: frozen,
        language_dropout: language.dropout,
        prompt: language.text.prompt(),
        untargeted: language.text.untargeted(),
        vocabulary: language.config.vocab_size() as usize,
        end_tokens: language.text.end_tokens().to_vec(),
    };
    let tokenizer = language.dir.path().to_path_buf();
    Ok(Built { task: Box::new(task), text: language.text, tokenizer, loaded: vec![trained, of_language] })
}

/// The id that fills stage 1's texts. The tokenizer must frame a text, for ITC reads its first token, ITG begins there and learns to end.
fn pad_id(folder: &Path, encoder: &TextEncoder) -> Result<i64, Error> {
    let special = SpecialTokens::of(folder)?;
    if encoder.encode("")?.len() != 2 {
        let (begin, end) = (special.begin, special.end);
        return Err(Error::file(
            folder,
            format!(
                "expected a tokenizer that puts {begin} in front of a text and {end} behind it; its post_processor does not"
            ),
        ));
    }
    let missing = || {
        Error::file(
            folder,
            format!(
                "its tokenizer has no token {}; name the one that fills texts as pad_token in special_tokens_map.json",
                special.pad
            ),
        )
    };
    encoder.token_id(&special.pad).map(i64::from).ok_or_else(missing)
}
