//! From a configuration to models with their weights: what a stage is made of before its first step.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2_data::{SpecialTokens, TextEncoder};
use blip2_model::qformer::QFormerConfig;
use blip2_model::vision::VisionConfig;
use blip2_model::{Blip2Config, Stage1, Stage2};
use blip2_torchx::params::{LoadPlan, LoadReport, ParamStore};
use blip2_weights::plans::{self, QFormerSource};
use blip2_weights::{ModelDir, ModelKind, Part, PartView};
use serde_json::{Value, json};
use tch::Device;

use crate::checkpoint::CheckpointStore;
use crate::config::{AutoOr, Config, QFormerConfig as QFormerKeys, Stage};
use crate::encoder::{ImageEncoder, check_image_size};
use crate::error::Error;
use crate::language::LanguagePlan;
use crate::model_files::{load_image_encoder, load_language_model};
use crate::preprocessing::Preprocessing;
use crate::task::stage1::Stage1Options;
use crate::task::{Stage1Task, Stage2Task, Task};
use crate::text::TextFrame;

/// Width of ITC's embeddings (BLIP-2, section 3.2).
const IMAGE_TEXT_HIDDEN_SIZE: i64 = 256;

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
    /// What became of the initial weights' tensors.
    pub report: LoadReport,
}

impl Assembly {
    /// Builds the stage that `config` describes and fills it.
    ///
    /// # Errors
    /// Weights that are missing or do not fit, parts that do not fit each other; each names the keys.
    pub fn build(config: &Config, device: Device) -> Result<Assembly, Error> {
        tch::manual_seed(config.run.seed as i64);
        let vision_dir = ModelDir::open(&config.model.vision.weights)?;
        let vision_part = vision_dir.part(Part::Vision)?;
        let vision_json = vision_part.config.clone();
        let vision = VisionConfig::from_json(&vision_json).map_err(model_error(vision_dir.path()))?;
        let preprocessing = Preprocessing::of(vision_dir.path(), &vision, &config.data.image.size)?;
        check_image_size(&vision, preprocessing.size)?;
        let layer = match config.model.vision.layer {
            AutoOr::Auto => None,
            AutoOr::Given(layer) => Some(layer),
        };
        let depth = vision.depth(layer).map_err(model_error(vision_dir.path()))?;
        let init = Init::open(&config.model.qformer)?;
        let qformer = init.qformer_config(config, &vision)?;

        let mut model_json = json!({
            "model_type": "blip-2",
            "vision_config": vision_json,
            "qformer_config": qformer_json(&qformer),
            "num_query_tokens": config.model.qformer.query_tokens,
            "vision_feature_layer": depth,
        });
        match config.task.stage {
            Stage::One => {
                model_json["architectures"] = json!(["Blip2ForImageTextRetrieval"]);
                model_json["image_text_hidden_size"] = json!(init.embedding_width());
                model_json["qformer_decoder_start_token_id"] = json!(init.decoder_start(&qformer));
            }
            Stage::Two => model_json["architectures"] = json!(["Blip2ForConditionalGeneration"]),
        }
        let built = match config.task.stage {
            Stage::One => build_stage1(config, &init, &model_json, device)?,
            Stage::Two => build_stage2(config, &init, &mut model_json, device)?,
        };
        let kind = config.model.vision.dtype.kind();
        let encoder = load_image_encoder(&vision_dir, &vision, depth, preprocessing, device, kind)?;
        Ok(Assembly {
            encoder,
            task: built.task,
            text: built.text,
            tokenizer: built.tokenizer,
            report: built.report,
            model_json,
        })
    }
}

struct Built {
    task: Box<dyn Task>,
    text: TextFrame,
    tokenizer: PathBuf,
    report: LoadReport,
}

fn build_stage1(config: &Config, init: &Init, model_json: &Value, device: Device) -> Result<Built, Error> {
    let model_config = Blip2Config::from_json(model_json).map_err(model_error(&init.path))?;
    let params = ParamStore::trainable(device);
    let model = Stage1::new(&params.root(), &model_config);
    let part = init.dir.part(Part::QFormer)?;
    let plan = match init.kind {
        QFormerSource::Bert => plans::stage1_from_bert(&part.weights)?,
        QFormerSource::Stage1 => LoadPlan::exact(),
        QFormerSource::Stage2 => {
            return Err(Error::Mismatch(format!(
                "model.qformer.init: expected a BERT or a stage-1 model for task.stage: 1, got a stage-2 model ({}), which has no text half",
                init.path.display()
            )));
        }
    };
    let report = params.load(&part.weights, &init.plan(&part.weights, plan)?)?;
    let max = model_config.qformer.max_position_embeddings as usize;
    if config.task.max_text_tokens > max {
        return Err(Error::Mismatch(format!(
            "task.max_text_tokens: expected at most the Q-Former's max_position_embeddings of {max}, got {}",
            config.task.max_text_tokens
        )));
    }
    let encoder = TextEncoder::from_folder(&init.tokenizer, config.task.max_text_tokens, true)?;
    let ids = encoder.vocab_size() as i64;
    if ids > model_config.qformer.vocab_size {
        return Err(Error::Mismatch(format!(
            "{}: the tokenizer has {ids} tokens, the model's vocabulary {}",
            init.tokenizer.display(),
            model_config.qformer.vocab_size
        )));
    }
    let pad = pad_id(&init.tokenizer, &encoder)?;
    let weights = &config.task.losses;
    let options = Stage1Options {
        itc: weights.itc,
        itm: weights.itm,
        itg: weights.itg,
        label_smoothing: config.task.label_smoothing,
        itm_weight_floor: config.task.itm_weight_floor,
    };
    let text = TextFrame::plain(Arc::new(encoder), pad);
    Ok(Built { task: Box::new(Stage1Task { model, params, options }), text, tokenizer: init.tokenizer.clone(), report })
}

fn build_stage2(config: &Config, init: &Init, model_json: &mut Value, device: Device) -> Result<Built, Error> {
    let language = LanguagePlan::open(config)?;
    model_json["text_config"] = language.json.clone();
    if let Some(before) = &language.before_queries {
        model_json["before_queries"] = json!(before);
    }
    let model_config = Blip2Config::from_json(model_json).map_err(model_error(&init.path))?;
    let params = ParamStore::trainable(device);
    let before = language.before_queries.clone().unwrap_or_default();
    let model = Stage2::new(&params.root(), &model_config, language.config.hidden_size(), before);
    let part = init.dir.part(Part::QFormer)?;
    let plan = match init.kind {
        QFormerSource::Stage1 => plans::stage2_from_stage1(),
        QFormerSource::Stage2 => LoadPlan::exact(),
        QFormerSource::Bert => {
            return Err(Error::Mismatch(format!(
                "model.qformer.init: expected a stage-1 or stage-2 model for task.stage: 2, got a BERT ({}); train stage 1 first",
                init.path.display()
            )));
        }
    };
    let report = params.load(&part.weights, &init.plan(&part.weights, plan)?)?;
    let task = Stage2Task {
        model,
        params,
        language: load_language_model(&language.dir, &language.config, device, language.dtype)?,
        language_dropout: language.dropout,
        prompt: language.text.prompt(),
        untargeted: language.text.untargeted(),
        vocabulary: language.config.vocab_size() as usize,
        end_tokens: language.text.end_tokens().to_vec(),
    };
    let tokenizer = language.dir.path().to_path_buf();
    Ok(Built { task: Box::new(task), text: language.text, tokenizer, report })
}

/// What the Q-Former starts from.
struct Init {
    path: PathBuf,
    dir: ModelDir,
    kind: QFormerSource,
    tokenizer: PathBuf,
}

impl Init {
    /// A BERT directory, an export, a checkpoint, a `.pth` of LAVIS, or a run, of which the newest checkpoint is taken.
    fn open(config: &QFormerKeys) -> Result<Init, Error> {
        let path: &Path = &config.init;
        let (folder, tokenizer) = if path.join("config.yaml").exists() {
            let newest = CheckpointStore::read_only(&path.join("checkpoints"), None).newest()?;
            let checkpoint = newest.checkpoint.ok_or_else(|| {
                Error::file(path, "this run has no checkpoint yet; train it first, or name a BERT directory, a checkpoint or an export")
            })?;
            (checkpoint.path().to_path_buf(), path.join("tokenizer"))
        } else if path.join("MANIFEST.json").exists() {
            // runs/NAME/checkpoints/step_N
            let run = path.ancestors().nth(2).unwrap_or(path);
            (path.to_path_buf(), run.join("tokenizer"))
        } else if path.is_file() {
            (path.to_path_buf(), path.parent().unwrap_or(path).to_path_buf())
        } else {
            (path.to_path_buf(), path.to_path_buf())
        };
        let tokenizer = config.tokenizer.clone().unwrap_or(tokenizer);
        let dir = ModelDir::open(&folder)?;
        let kind = QFormerSource::detect(&dir.part(Part::QFormer)?.weights)
            .ok_or_else(|| Error::file(&folder, "expected a BERT's or a Q-Former's tensors; found neither"))?;
        Ok(Init { path: folder, dir, kind, tokenizer })
    }

    /// The stage's plan for what the source holds.
    fn plan(&self, source: &PartView, plan: LoadPlan) -> Result<LoadPlan, Error> {
        Ok(if self.dir.kind() == &ModelKind::LavisCheckpoint { plans::from_lavis(source, plan)? } else { plan })
    }

    /// The Q-Former that `config` asks for, checked against what the source has.
    fn qformer_config(&self, config: &Config, vision: &VisionConfig) -> Result<QFormerConfig, Error> {
        let part = self.dir.part(Part::QFormer)?;
        let mut qformer = QFormerConfig::from_json(part.config).map_err(model_error(&self.path))?;
        let wanted = &config.model.qformer;
        let width = vision.hidden_size();
        let frequency = wanted.cross_attention_frequency as i64;
        if self.kind == QFormerSource::Bert {
            // [DEC] becomes the vocabulary's last entry.
            qformer.vocab_size += 1;
            qformer.encoder_hidden_size = width;
            qformer.cross_attention_frequency = frequency;
        } else {
            let queries = self.dir.config()["num_query_tokens"].as_u64().unwrap_or(0);
            let expect = |key: &str, here: i64, there: i64| {
                if here == there {
                    return Ok(());
                }
                Err(Error::Mismatch(format!(
                    "{key}: {here} here, but model.qformer.init ({}) has {there}",
                    self.path.display()
                )))
            };
            expect("model.vision.weights: width of the image features", width, qformer.encoder_hidden_size)?;
            expect("model.qformer.query_tokens", wanted.query_tokens as i64, queries as i64)?;
            expect("model.qformer.cross_attention_frequency", frequency, qformer.cross_attention_frequency)?;
        }
        qformer.hidden_dropout_prob = wanted.dropout;
        qformer.attention_probs_dropout_prob = wanted.dropout;
        Ok(qformer)
    }

    fn embedding_width(&self) -> i64 {
        self.dir.config()["image_text_hidden_size"].as_i64().unwrap_or(IMAGE_TEXT_HIDDEN_SIZE)
    }

    fn decoder_start(&self, qformer: &QFormerConfig) -> i64 {
        self.dir.config()["qformer_decoder_start_token_id"].as_i64().unwrap_or(qformer.vocab_size - 1)
    }
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

fn qformer_json(qformer: &QFormerConfig) -> Value {
    let mut json = json!(qformer);
    json["model_type"] = json!("blip_2_qformer");
    json
}

fn model_error(path: &Path) -> impl Fn(blip2_model::ConfigError) -> Error + '_ {
    move |source| Error::Model { path: path.into(), source }
}
