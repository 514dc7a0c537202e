//! A stage as its files describe it, before a tensor is read or a device touched.

use blip2_model::Blip2Config;
use blip2_model::qformer::QFormerConfig;
use blip2_model::vision::VisionConfig;
use blip2_torchx::params::{LoadError, LoadPlan, ParamStore};
use blip2_weights::{ModelDir, Part, PartView, plans};
use serde_json::{Value, json};
use tch::Kind;

use crate::assembly::declared;
use crate::assembly::language::LanguagePlan;
use crate::assembly::preprocessing::Preprocessing;
use crate::assembly::qformer_init::QFormerInit;
use crate::assembly::stage1_text::stage1_text;
use crate::assembly::vision_layer;
use crate::config::{Config, Stage};
use crate::data::text::TextFrame;
use crate::error::Error;
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

impl Blueprint {
    /// Reads every configuration and every header, and compares what each part needs with what its files have.
    ///
    /// # Errors
    /// Files that are missing or damaged, parts that do not fit each other; each names the keys. Everything that is missing, unexpected or
    /// misshapen in any part, at once.
    pub fn open(config: &Config) -> Result<Blueprint, Error> {
        let vision_dir = config.model.vision.weights.open()?;
        let wrong = |source| Error::Model { path: vision_dir.path().into(), source };
        let vision_json = vision_dir.part(Part::Vision)?.config.clone();
        let vision = VisionConfig::from_json(&vision_json).map_err(wrong)?;
        let preprocessing = Preprocessing::of(vision_dir.path(), &vision, &config.data.image.size)?;
        check_image_size(&vision, preprocessing.size)?;
        let init = QFormerInit::open(&config.model.qformer)?;
        let depth = vision_layer::depth(config, &vision_dir, &vision, &init)?;
        let qformer = init.qformer_config(config, &vision)?;
        let mut model_json = json!({
            "model_type": "blip-2",
            "vision_config": vision_json,
            "qformer_config": qformer_json(&qformer),
            "num_query_tokens": config.model.qformer.query_tokens,
            "vision_feature_layer": depth,
        });
        let words = match config.task.stage {
            Stage::One => {
                model_json["architectures"] = json!(["Blip2ForImageTextRetrieval"]);
                model_json["image_text_hidden_size"] = json!(init.embedding_width());
                model_json["qformer_decoder_start_token_id"] = json!(init.decoder_start(&qformer));
                Words::Captions(stage1_text(&init.tokenizer, config.task.max_text_tokens, &qformer)?)
            }
            Stage::Two => {
                let plan = LanguagePlan::open(config)?;
                model_json["architectures"] = json!(["Blip2ForConditionalGeneration"]);
                model_json["text_config"] = plan.json.clone();
                if let Some(before) = &plan.before_queries {
                    model_json["before_queries"] = json!(before);
                }
                Words::Language(Box::new(plan))
            }
        };
        let model =
            Blip2Config::from_json(&model_json).map_err(|source| Error::Model { path: init.path.clone(), source })?;
        let vision_dtype = config.model.vision.dtype.kind();
        let blueprint =
            Blueprint { vision_dir, vision, depth, preprocessing, init, words, model, model_json, vision_dtype };
        blueprint.audit()?;
        Ok(blueprint)
    }

    /// Compares what every part needs with what its files have.
    fn audit(&self) -> Result<(), Error> {
        let mut wrong: Vec<LoadError> = Vec::new();
        let mut compare = |store: ParamStore, source: &PartView, plan: &LoadPlan| {
            wrong.extend(store.audit(source, plan).into_result(source).err());
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
        match wrong.len() {
            0 => Ok(()),
            1 => Err(Error::Load(wrong.remove(0))),
            _ => Err(Error::Loads(wrong)),
        }
    }
}

fn qformer_json(qformer: &QFormerConfig) -> Value {
    let mut json = json!(qformer);
    json["model_type"] = json!("blip_2_qformer");
    json
}
