//! A stage as its files describe it, before a tensor is read or a device touched.

use blip2_model::Blip2Config;
use blip2_model::qformer::QFormerConfig;
use blip2_model::vision::VisionConfig;
use blip2_torchx::params::{LoadPlan, ParamStore};
use blip2_weights::{ModelDir, Part, PartView, plans};
use serde_json::{Value, json};
use tch::Kind;

use crate::assembly::declared;
use crate::assembly::language::LanguagePlan;
use crate::assembly::preprocessing::Preprocessing;
use crate::assembly::qformer_init::QFormerInit;
use crate::assembly::vision_layer;
use crate::config::{Config, Stage};
use crate::data::text::TextFrame;
use crate::error::{Error, Mistakes};
use crate::features::encoder::check_image_size;

/// What a stage reads and writes captions with.
pub enum Words {
    /// Stage 1: the Q-Former's own text half.
    Captions(TextFrame),
    /// Stage 2: a frozen language model.
    Language(Box<LanguagePlan>),
}

/// The parts of a stage: where their weights lie and what they are.
pub struct Blueprint {
    /// Where the image encoder's weights lie.
    pub vision_dir: ModelDir,
    /// The image encoder.
    pub vision: VisionConfig,
    /// How many of its blocks run.
    pub depth: i64,
    /// What is done to a picture before it.
    pub preprocessing: Preprocessing,
    /// What the Q-Former starts from.
    pub init: QFormerInit,
    /// What it reads and writes captions with.
    pub words: Words,
    /// The whole model.
    pub model: Blip2Config,
    /// The same as `config.json`, as a checkpoint keeps it.
    pub model_json: Value,
    /// Storage of the image encoder's weights.
    pub vision_dtype: Kind,
}

/// The frozen image encoder as its files describe it.
pub(crate) struct VisionFiles {
    dir: ModelDir,
    json: Value,
    config: VisionConfig,
    preprocessing: Preprocessing,
}

impl VisionFiles {
    /// Reads what `model.vision` names.
    ///
    /// # Errors
    /// Files that are missing or damaged, images of a size that does not suit it.
    pub fn open(config: &Config) -> Result<VisionFiles, Error> {
        let dir = config.model.vision.weights.open()?;
        let json = dir.part(Part::Vision)?.config.clone();
        let vision = VisionConfig::from_json(&json);
        let vision = vision.map_err(|source| Error::Model { path: dir.path().into(), source })?;
        let preprocessing = Preprocessing::of(dir.path(), &vision, &config.data.image.size)?;
        check_image_size(&vision, preprocessing.size)?;
        Ok(VisionFiles { dir, json, config: vision, preprocessing })
    }

    /// Width of the image features.
    pub fn width(&self) -> i64 {
        self.config.hidden_size()
    }
}

impl Blueprint {
    /// Reads every configuration and every header, and compares what each part needs with what its files have.
    ///
    /// # Errors
    /// Files that are missing or damaged, parts that do not fit each other, whatever is missing, unexpected or misshapen in any part, a tokenizer
    /// that does not suit its model; each names the keys, and what does not depend on each other is told at once.
    pub fn open(config: &Config) -> Result<Blueprint, Error> {
        let mut wrong = Mistakes::default();
        let vision = wrong.take(VisionFiles::open(config));
        let init = wrong.take(open_init(config));
        let words = match (config.task.stage, &init) {
            (Stage::One, None) => None,
            (Stage::One, Some(init)) => wrong.take(init.text(config.task.max_text_tokens)).map(Words::Captions),
            (Stage::Two, _) => wrong.take(LanguagePlan::open(config)).map(Box::new).map(Words::Language),
        };
        let (Some(vision), Some(init), Some(words)) = (vision, init, words) else { return Err(wrong.into_error()) };
        let depth = wrong.take(vision_layer::depth(config, &vision.dir, &vision.config, &init));
        let qformer = wrong.take(init.qformer_config(config, &vision.config));
        let (Some(depth), Some(qformer)) = (depth, qformer) else { return Err(wrong.into_error()) };
        let mut model_json = json!({
            "model_type": "blip-2",
            "vision_config": vision.json,
            "qformer_config": qformer_json(&qformer),
            "num_query_tokens": config.model.qformer.query_tokens,
            "vision_feature_layer": depth,
        });
        match &words {
            Words::Captions(_) => {
                model_json["architectures"] = json!(["Blip2ForImageTextRetrieval"]);
                model_json["image_text_hidden_size"] = json!(init.embedding_width());
                model_json["qformer_decoder_start_token_id"] = json!(init.decoder_start(&qformer));
            }
            Words::Language(plan) => {
                model_json["architectures"] = json!(["Blip2ForConditionalGeneration"]);
                model_json["text_config"] = plan.json.clone();
                if let Some(before) = &plan.before_queries {
                    model_json["before_queries"] = json!(before);
                }
            }
        }
        let model =
            Blip2Config::from_json(&model_json).map_err(|source| Error::Model { path: init.path.clone(), source })?;
        let VisionFiles { dir: vision_dir, config: vision, preprocessing, .. } = vision;
        let vision_dtype = config.model.vision.dtype.kind();
        let blueprint =
            Blueprint { vision_dir, vision, depth, preprocessing, init, words, model, model_json, vision_dtype };
        blueprint.audit()?;
        Ok(blueprint)
    }

    /// Compares what every part needs with what its files have.
    fn audit(&self) -> Result<(), Error> {
        let mut wrong = Mistakes::default();
        let mut compare = |store: ParamStore, source: &PartView, plan: &LoadPlan| {
            wrong.take(store.audit(source, plan).into_result(source).map_err(Error::Load));
        };
        let source = self.vision_dir.part(Part::Vision)?.weights;
        compare(declared::image_encoder(&self.vision, self.depth), &source, &plans::vision_tower(self.depth as usize));

        let (stage, width) = match &self.words {
            Words::Captions(_) => (Stage::One, None),
            Words::Language(language) => (Stage::Two, Some(language.config.hidden_size())),
        };
        let source = self.init.dir.part(Part::QFormer)?.weights;
        compare(declared::trained(&self.model, width), &source, &self.init.plan(stage, &source)?);

        if let Words::Language(language) = &self.words {
            let part = language.dir.part(Part::Language)?;
            let plan = plans::language_model(plans::tied_head(part.config));
            compare(declared::language_model(&language.config), &part.weights, &plan);
        }
        wrong.into_result()
    }

    /// Captions to ids.
    pub(crate) fn text(&self) -> &TextFrame {
        match &self.words {
            Words::Captions(text) => text,
            Words::Language(language) => &language.text,
        }
    }
}

/// What the Q-Former starts from, which must be something that the stage can begin from: its tokenizer may be another stage's.
fn open_init(config: &Config) -> Result<QFormerInit, Error> {
    let init = QFormerInit::open(&config.model.qformer)?;
    init.plan(config.task.stage, &init.dir.part(Part::QFormer)?.weights)?;
    Ok(init)
}

fn qformer_json(qformer: &QFormerConfig) -> Value {
    let mut json = json!(qformer);
    json["model_type"] = json!("blip_2_qformer");
    json
}
