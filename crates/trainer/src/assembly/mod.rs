//! From a configuration to models with their weights: what a stage is made of before its first step.

pub mod blueprint;
pub(crate) mod declared;
pub(crate) mod language;
pub(crate) mod loading;
pub mod model_files;
pub mod preprocessing;
mod qformer_init;
mod stage1_text;
mod vision_layer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use blip2_model::{Blip2Config, Stage1, Stage2};
use blip2_torchx::params::ParamStore;
use blip2_weights::Part;
use serde_json::Value;
use tch::{Device, Tensor};

use crate::assembly::blueprint::{Blueprint, Words};
use crate::assembly::language::LanguagePlan;
use crate::assembly::loading::{LoadedPart, QFORMER, fill};
use crate::assembly::model_files::{load_image_encoder, load_language_model};
use crate::assembly::qformer_init::QFormerInit;
use crate::config::{Config, Contrastive, NegativeSamples, Stage};
use crate::data::text::TextFrame;
use crate::error::{Error, Mistakes};
use crate::features::encoder::ImageEncoder;
use crate::ranks::checksum;
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
    pub fn build(config: &Config, blueprint: Blueprint, device: Device) -> Result<Assembly, Error> {
        let Blueprint { vision_dir, vision, depth, preprocessing, vision_dtype, init, words, model, model_json } =
            blueprint;
        tch::manual_seed(config.run.seed as i64);
        let built = match words {
            Words::Captions(text) => build_stage1(config, &init, &model, text, device)?,
            Words::Language(language) => build_stage2(&init, &model, *language, device)?,
        };
        let (encoder, tower) = load_image_encoder(&vision_dir, &vision, depth, preprocessing, device, vision_dtype)?;
        let Built { task, text, tokenizer, mut loaded } = built;
        loaded.insert(0, tower);
        Ok(Assembly { encoder, task, text, tokenizer, model_json, loaded })
    }

    /// Numbers that tell the frozen towers' weights from others, on any device, by the keys that name them.
    pub fn frozen_weights(&self) -> BTreeMap<String, String> {
        let vision = ("model.vision.weights", self.encoder.params());
        let language = self.task.frozen().map(|params| ("model.language.weights", params));
        let told = |(key, params): (&str, &ParamStore)| (key.to_owned(), format!("{:016x}", weights_checksum(params)));
        std::iter::once(vision).chain(language).map(told).collect()
    }
}

/// A number that tells the parameters of a store from others.
pub(crate) fn weights_checksum(params: &ParamStore) -> u64 {
    let tensors: Vec<Tensor> = params.entries().into_iter().map(|(_, tensor, _)| tensor).collect();
    checksum(&tensors)
}

/// The towers must have the weights that the run began with: what it trains was made for them.
///
/// # Errors
/// Other weights than those `recorded`, of which an older checkpoint has none.
pub(crate) fn check_frozen(recorded: &BTreeMap<String, String>, here: &BTreeMap<String, String>) -> Result<(), Error> {
    let mut wrong = Mistakes::default();
    for (key, _) in recorded.iter().filter(|(key, sum)| here.get(*key) != Some(*sum)) {
        let advice = "put them back, or begin a new run under another run.name";
        wrong.take(Err::<(), _>(Error::key(key, "the weights that the run began with", "others", advice)));
    }
    wrong.into_result()
}

struct Built {
    task: Box<dyn Task>,
    text: TextFrame,
    tokenizer: PathBuf,
    loaded: Vec<LoadedPart>,
}

/// Fills what a stage trains from what the Q-Former starts from.
fn fill_trained(init: &QFormerInit, stage: Stage, params: &ParamStore) -> Result<LoadedPart, Error> {
    let part = init.dir.part(Part::QFormer)?;
    fill(QFORMER, params, &part.weights, &init.plan(stage, &part.weights)?)
}

fn build_stage1(
    config: &Config,
    init: &QFormerInit,
    model: &Blip2Config,
    text: TextFrame,
    device: Device,
) -> Result<Built, Error> {
    let params = ParamStore::trainable(device);
    let model = Stage1::new(&params.root(), model);
    let loaded = vec![fill_trained(init, Stage::One, &params)?];
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
    let tokenizer = init.tokenizer.clone();
    Ok(Built { task: Box::new(Stage1Task { model, params, options }), text, tokenizer, loaded })
}

fn build_stage2(
    init: &QFormerInit,
    model: &Blip2Config,
    language: LanguagePlan,
    device: Device,
) -> Result<Built, Error> {
    let params = ParamStore::trainable(device);
    let before = language.before_queries.clone().unwrap_or_default();
    let model = Stage2::new(&params.root(), model, language.config.hidden_size(), before);
    let trained = fill_trained(init, Stage::Two, &params)?;
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
