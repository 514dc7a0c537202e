//! From a run or one of its checkpoints to a Hugging Face directory.

use std::path::{Path, PathBuf};

use blip2_model::Blip2Config;
use blip2_torchx::params::TensorSource;
use blip2_weights::{
    DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, ImagePreprocessing, ModelDir, Part, image_token_index,
};
use serde_json::Value;
use tch::Tensor;

use crate::checkpoint::{Checkpoint, CheckpointStore, Rejected};
use crate::config::{Config, LanguageConfig};
use crate::error::Error;
use crate::hub::Hub;

/// What was exported.
#[derive(Debug)]
pub struct Exported {
    /// The checkpoint that was taken.
    pub checkpoint: PathBuf,
    /// Its optimizer steps.
    pub step: u64,
    /// Better or newer checkpoints that are damaged.
    pub rejected: Vec<Rejected>,
}

/// Writes the model of `source` to the Hugging Face directory `out`; an earlier export there is replaced.
///
/// `source` is a run's folder, of which the best checkpoint by the run's `checkpoint.best` is taken and else the newest, or the folder of a
/// checkpoint inside a run. The frozen towers come from where the run's configuration has them, fetched again from `hub` where need be.
///
/// # Errors
/// Neither a run nor a checkpoint, no checkpoint that is whole, towers that are gone, an `out` that is no export.
pub fn export_checkpoint(source: &Path, out: &Path, hub: &Hub) -> Result<Exported, Error> {
    let (run, asked) = find_run(source)?;
    let mut config = Config::load_resolved(&run.join("config.yaml"))?;
    hub.resolve(&mut config)?;
    let (checkpoint, rejected) = match asked {
        Some(path) => (Checkpoint::open(&path)?, Vec::new()),
        None => {
            let found = CheckpointStore::read_only(&run.join("checkpoints"), config.checkpoint.best).preferred()?;
            let none = || match found.rejected.first() {
                None => Error::file(source, "this run has no checkpoint yet"),
                Some(first) => Error::file(
                    source,
                    format!("every checkpoint of this run is damaged; the newest: {}", first.reason),
                ),
            };
            (found.checkpoint.ok_or_else(none)?, found.rejected)
        }
    };
    let model = ModelDir::open(checkpoint.path())?;
    export_model(&config, model.config(), &run.join("tokenizer"), &trained(&model)?, out)?;
    Ok(Exported { checkpoint: checkpoint.path().to_path_buf(), step: checkpoint.step(), rejected })
}

/// The run's folder, and the checkpoint where `source` names one.
fn find_run(source: &Path) -> Result<(PathBuf, Option<PathBuf>), Error> {
    // `.` and `..` hide the folders above.
    let path = source.canonicalize().map_err(|error| Error::file(source, error))?;
    if path.join("config.yaml").exists() {
        return Ok((path, None));
    }
    // runs/NAME/checkpoints/step_00001000
    match path.ancestors().nth(2).filter(|run| run.join("config.yaml").exists()) {
        Some(run) => Ok((run.to_path_buf(), Some(path))),
        None => Err(Error::file(source, "expected a run's folder, which has config.yaml, or a checkpoint inside one")),
    }
}

/// Writes the Hugging Face directory `out` of what `config` trains.
///
/// `model_json` is the model's `config.json` as a checkpoint keeps it, `tokenizer` the folder of the tokenizer's files.
///
/// # Errors
/// Trained tensors that are not those of the stage, towers that are gone, an `out` that is no export.
pub fn export_model(
    config: &Config,
    model_json: &Value,
    tokenizer: &Path,
    trained: &[(String, Tensor)],
    out: &Path,
) -> Result<(), Error> {
    let wrong = |source| Error::Model { path: config.run_folder(), source };
    let model = Blip2Config::from_json(model_json).map_err(wrong)?;
    let depth = model.vision.depth(model.top.vision_feature_layer.or(Some(-1))).map_err(wrong)?;
    let (mean, std) = model.vision.normalisation();
    let vision = ModelDir::open(&config.model.vision.weights)?;
    let language = match (&model.language, &config.model.language) {
        (None, _) => None,
        (Some(language), Some(LanguageConfig { weights, .. })) => {
            let dir = ModelDir::open(weights)?;
            let inherited = dir.config().get("image_token_index").and_then(Value::as_i64);
            let text_config = dir.part(Part::Language)?.config;
            let image_token = image_token_index(tokenizer, text_config, inherited, language.vocab_size())?;
            Some((dir, image_token))
        }
        (Some(_), None) => {
            let message = "model.language: missing, but the checkpoint is of stage 2";
            return Err(Error::file(config.run_folder().join("config.yaml"), message));
        }
    };
    let before_queries = model.top.before_queries.clone().unwrap_or_default();
    let task = match &language {
        None => ExportTask::Stage1 {
            image_text_hidden_size: model.top.image_text_hidden_size as usize,
            decoder_start_token_id: model.decoder_start_token(),
        },
        Some((language, image_token)) => {
            ExportTask::Stage2 { language, before_queries: &before_queries, image_token_index: *image_token }
        }
    };
    let export = Export {
        task,
        trained,
        vision: &vision,
        vision_depth: depth as usize,
        qformer_config: model_json["qformer_config"].clone(),
        num_query_tokens: model.top.num_query_tokens as usize,
        image: ImagePreprocessing { size: config.data.image.size as u32, mean, std },
        tokenizer: Some(tokenizer),
        max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
    };
    Ok(export.write(out)?)
}

fn trained(model: &ModelDir) -> Result<Vec<(String, Tensor)>, Error> {
    let weights = model.weights();
    let read = |(name, _): (String, _)| match weights.read(&name) {
        Ok(tensor) => Ok((name, tensor)),
        Err(message) => Err(Error::file(model.path(), format!("{name}: {message}"))),
    };
    weights.entries().into_iter().map(read).collect()
}
