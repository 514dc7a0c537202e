//! From a run or one of its checkpoints to a Hugging Face directory, or to a file that LAVIS loads.

mod remarks;

use std::path::{Path, PathBuf};

use blip2_data::TextEncoder;
use blip2_model::Blip2Config;
use blip2_model::language::LanguageConfig as LanguageModelConfig;
use blip2_model::vision::VisionConfig;
use blip2_torchx::params::TensorSource;
use blip2_weights::{
    DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, FrozenElsewhere, LavisCheckpoint, ModelDir, Part, Projection, Stage,
    Towers, image_token_index, is_pad_token, names_image_token, save_lavis, with_all_ends,
};
use serde_json::{Value, json};
use tch::Tensor;

use crate::assembly::preprocessing::Preprocessing;
use crate::checkpoint::{Checkpoint, CheckpointStore, Rejected};
use crate::config::{Config, LanguageConfig, WeightsSource};
use crate::error::Error;
use crate::export::remarks::{BLIP2_VIT, ImageToken, image_encoder_type, remarks};
use crate::features::encoder::check_image_size;
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
    /// What `transformers` 4.57 cannot do with the directory, a line each.
    pub remarks: Vec<String>,
}

/// Writes the model of `source` to the Hugging Face directory `out`; an earlier export there is replaced.
///
/// `source` is a run's folder, of which the best checkpoint by the run's `checkpoint.best` is taken and else the newest, or the folder of a
/// checkpoint inside a run. The frozen towers come from where the run's configuration has them, fetched again from `hub` where need be; `towers` says whether they are copied.
///
/// # Errors
/// Neither a run nor a checkpoint, no checkpoint that is whole, towers that are gone, an `out` that is no export.
pub fn export_checkpoint(source: &Path, out: &Path, towers: FrozenTowers, hub: &Hub) -> Result<Exported, Error> {
    let Chosen { run, mut config, checkpoint, rejected } = choose(source)?;
    hub.resolve_towers(&mut config)?;
    let model = ModelDir::open(checkpoint.path())?;
    let remarks = export_model(&config, model.config(), &run.join("tokenizer"), &trained(&model)?, towers, out)?;
    Ok(Exported { checkpoint: checkpoint.path().to_path_buf(), step: checkpoint.step(), rejected, remarks })
}

/// Writes what was trained to `out`, a `.pth` as LAVIS saves it; `source` is as for [`export_checkpoint`].
///
/// The frozen towers are not part of it. A file at `out` stays: it may be the checkpoint that the run began from.
///
/// # Errors
/// Neither a run nor a checkpoint, no checkpoint that is whole, trained tensors that are not those of the stage, an `out` that is there.
pub fn export_lavis(source: &Path, out: &Path) -> Result<Exported, Error> {
    if out.exists() {
        return Err(Error::file(out, "it is there already and is not overwritten; choose another name, as model.pth"));
    }
    let Chosen { checkpoint, rejected, .. } = choose(source)?;
    let model = ModelDir::open(checkpoint.path())?;
    let json = model.config();
    let wrong = |source| Error::Model { path: checkpoint.path().into(), source };
    let qformer = Blip2Config::from_json(json).map_err(wrong)?.qformer;
    let family = json["text_config"]["model_type"].as_str();
    save_lavis(
        &LavisCheckpoint {
            trained: model.weights(),
            stage: if family.is_some() { Stage::Two } else { Stage::One },
            layers: qformer.num_hidden_layers as usize,
            cross_attention_frequency: qformer.cross_attention_frequency as usize,
            positions: qformer.max_position_embeddings,
            projection: Projection::of(family.unwrap_or_default()),
        },
        out,
    )?;
    let checkpoint_path = checkpoint.path().to_path_buf();
    Ok(Exported { checkpoint: checkpoint_path, step: checkpoint.step(), rejected, remarks: Vec::new() })
}

/// A run with the checkpoint that is exported.
struct Chosen {
    run: PathBuf,
    config: Config,
    checkpoint: Checkpoint,
    rejected: Vec<Rejected>,
}

fn choose(source: &Path) -> Result<Chosen, Error> {
    let (run, asked) = find_run(source)?;
    let config = Config::load_resolved(&run.join("config.yaml"))?;
    let (checkpoint, rejected) = match asked {
        Some(path) => (Checkpoint::open(&path)?, Vec::new()),
        None => {
            let found = CheckpointStore::read_only(&run.join("checkpoints"), config.checkpoint.best).preferred()?;
            found.or_none_of(source)?
        }
    };
    Ok(Chosen { run, config, checkpoint, rejected })
}

/// What an export does with the frozen towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrozenTowers {
    /// They are written with what was trained.
    Copied,
    /// They are named by folder or hub id and digest.
    Named,
}

/// The frozen towers of a run by where they lie, with the digests of their weights.
fn named_towers(
    config: &Config,
    vision: &ModelDir,
    language: Option<&ModelDir>,
) -> Result<Vec<FrozenElsewhere>, Error> {
    let tower = |part, source: &WeightsSource, dir: &ModelDir| -> Result<FrozenElsewhere, Error> {
        // A relative path starts at the directory that says it.
        let canonical = |path: &Path| path.canonicalize().map_err(|error| Error::file(path, error));
        if let Some(named) = dir.frozen_elsewhere(part) {
            return Ok(FrozenElsewhere { path: canonical(&named.path)?, ..named.clone() });
        }
        let path = canonical(dir.path())?;
        let source = match source.hub_id() {
            Some(id) => id.to_string(),
            None => path.display().to_string(),
        };
        Ok(FrozenElsewhere { part, source, path, digest: weights_digest(dir)? })
    };
    let mut named = vec![tower(Part::Vision, &config.model.vision.weights, vision)?];
    if let (Some(dir), Some(LanguageConfig { weights, .. })) = (language, &config.model.language) {
        named.push(tower(Part::Language, weights, dir)?);
    }
    Ok(named)
}

/// BLAKE3 of a directory's weight files, in their order.
fn weights_digest(dir: &ModelDir) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    for file in dir.weights().files() {
        let path = file.path();
        let mut reader = std::fs::File::open(path).map_err(|error| Error::file(path, error))?;
        hasher.update_reader(&mut reader).map_err(|error| Error::file(path, error))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Checks that the towers which a directory names are those that it was trained with.
///
/// # Errors
/// A tower that is gone or has other weights.
pub(crate) fn verify_towers(dir: &ModelDir) -> Result<(), Error> {
    for part in [Part::Vision, Part::Language] {
        let (Some(named), Some(tower)) = (dir.frozen_elsewhere(part), dir.open_elsewhere(part)?) else { continue };
        let digest = weights_digest(tower)?;
        if digest != named.digest {
            return Err(Error::file(
                tower.path(),
                format!(
                    "expected the weights that {} was trained with (BLAKE3 {}, from {}), got {digest}",
                    dir.path().display(),
                    named.digest,
                    named.source
                ),
            ));
        }
    }
    Ok(())
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

/// Writes the Hugging Face directory `out` of what `config` trains. Returns what `transformers` cannot do with it.
///
/// `model_json` is the model's `config.json` as a checkpoint keeps it, `tokenizer` the folder of the tokenizer's files.
///
/// # Errors
/// Trained tensors that are not those of the stage, towers that are gone, an `out` that is no export.
pub(crate) fn export_model(
    config: &Config,
    model_json: &Value,
    tokenizer: &Path,
    trained: &[(String, Tensor)],
    towers: FrozenTowers,
    out: &Path,
) -> Result<Vec<String>, Error> {
    let wrong = |source| Error::Model { path: config.run_folder(), source };
    let model = Blip2Config::from_json(model_json).map_err(wrong)?;
    let depth = model.vision.depth(model.top.vision_feature_layer.or(Some(-1))).map_err(wrong)?;
    let vision = config.model.vision.weights.open()?;
    let preprocessing = Preprocessing::of(vision.path(), &model.vision, &config.data.image.size)?;
    let positions = match towers {
        FrozenTowers::Copied => resized_positions(&vision, &model.vision, model_json, preprocessing.size)?,
        FrozenTowers::Named => None,
    };
    let language = match (&model.language, &config.model.language) {
        (None, _) => None,
        (Some(language), Some(LanguageConfig { weights, .. })) => {
            let dir = weights.open()?;
            let inherited = dir.config().get("image_token_index").and_then(Value::as_i64);
            let text_config = exported_text_config(&dir, &model_json["text_config"], language, tokenizer)?;
            let index = image_token_index(tokenizer, &text_config, inherited, language.vocab_size())?;
            let pads = index.map(|id| is_pad_token(tokenizer, &text_config, id)).transpose()?.unwrap_or(false);
            let named = index.map(|id| names_image_token(tokenizer, id)).transpose()?.unwrap_or(false);
            Some((dir, text_config, ImageToken { index, pads, named }))
        }
        (Some(_), None) => {
            let message = "model.language: missing, but the checkpoint is of stage 2";
            return Err(Error::file(config.run_folder().join("config.yaml"), message));
        }
    };
    let task = match &language {
        None => ExportTask::Stage1 {
            image_text_hidden_size: model.top.image_text_hidden_size as usize,
            decoder_start_token_id: model.decoder_start_token(),
        },
        Some((language, text_config, image_token)) => ExportTask::Stage2 {
            language,
            text_config,
            before_queries: model.top.before_queries.as_deref(),
            image_token_index: image_token.index,
        },
    };
    let named = match towers {
        FrozenTowers::Copied => Vec::new(),
        FrozenTowers::Named => named_towers(config, &vision, language.as_ref().map(|(dir, ..)| dir))?,
    };
    let export = Export {
        towers: match towers {
            FrozenTowers::Copied => Towers::Copied,
            FrozenTowers::Named => Towers::Named(&named),
        },
        task,
        trained,
        vision: &vision,
        vision_depth: depth as usize,
        positions: positions.as_ref(),
        qformer_config: model_json["qformer_config"].clone(),
        num_query_tokens: model.top.num_query_tokens as usize,
        image: preprocessing.exported(),
        tokenizer: Some(tokenizer),
        max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
    };
    export.write(out)?;
    Ok(remarks(&model, model_json, language.as_ref().map(|(.., image_token)| image_token)))
}

/// The language model's configuration with all that ends its texts. What ends the captions that were trained on replaces the language model's own
/// ends (OPT's line break); else those that only its `generation_config.json` has are added.
fn exported_text_config(
    dir: &ModelDir,
    trained: &Value,
    language: &LanguageModelConfig,
    tokenizer: &Path,
) -> Result<Value, Error> {
    let own = dir.part(Part::Language)?.config.get("eos_token_id");
    let mut config = trained.clone();
    match trained.get("eos_token_id") {
        Some(end) if own != Some(end) => return Ok(config),
        Some(_) => {}
        // The class knows it, but the ids that are added would take its place.
        None => config["eos_token_id"] = json!(language.eos_token_ids().first()),
    }
    match language {
        LanguageModelConfig::Decoder(_) => Ok(with_all_ends(&config, dir.path())?),
        LanguageModelConfig::T5(t5) => {
            // Where there is no prompt, `transformers` lets it read this token behind the queries. It was trained with what its tokenizer puts there.
            let special = TextEncoder::from_file(tokenizer.join("tokenizer.json"), usize::MAX, true)?.encode("")?;
            if config["bos_token_id"].is_null() && special.iter().map(|&id| i64::from(id)).eq([t5.eos_token_id]) {
                config["bos_token_id"] = json!(t5.eos_token_id);
            }
            Ok(config)
        }
    }
}

/// The table of positions of BLIP-2's ViT for images of `size` pixels, by its name, where that is not the ViT's own size. Other towers keep theirs:
/// `transformers` has no BLIP-2 with them, and every reader resizes by itself.
fn resized_positions(
    dir: &ModelDir,
    vision: &VisionConfig,
    model_json: &Value,
    size: usize,
) -> Result<Option<(String, Tensor)>, Error> {
    check_image_size(vision, size)?;
    let (size, own) = (size as i64, vision.image_size());
    if size == own || image_encoder_type(model_json) != BLIP2_VIT {
        return Ok(None);
    }
    let Some((name, expected)) = vision.position_table(own) else { return Ok(None) };
    let name = format!("vision_model.{name}");
    let wrong = |message: String| Error::file(dir.path(), format!("{name}: {message}"));
    let table = dir.part(Part::Vision)?.weights.read(&name).map_err(wrong)?;
    if table.size() != expected {
        return Err(wrong(format!("expected shape {expected:?}, got {:?}", table.size())));
    }
    let resized = vision.resized_positions(&table, size);
    Ok(Some((name, resized)))
}

fn trained(model: &ModelDir) -> Result<Vec<(String, Tensor)>, Error> {
    let weights = model.weights();
    let read = |(name, _): (String, _)| match weights.read(&name) {
        Ok(tensor) => Ok((name, tensor)),
        Err(message) => Err(Error::file(model.path(), format!("{name}: {message}"))),
    };
    weights.entries().into_iter().map(read).collect()
}
