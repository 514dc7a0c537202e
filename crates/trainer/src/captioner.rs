//! Captions for image files from an exported stage-2 model.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_data::{TextEncoder, decode, evaluate_transform};
use blip2_model::language::{CaptionFrame, GenerateOptions, LanguageConfig};
pub use blip2_model::language::{Decoding, EarlyStopping};
use rayon::prelude::*;
use serde_json::Value;
use tch::{Device, Kind};

use crate::assembly::model_files::ModelFiles;
use crate::assembly::preprocessing::Preprocessing;
use crate::config::{Precision, WeightsSource};
use crate::data::text::{trimmed, written};
use crate::error::Error;
use crate::features::encoder::{ImageEncoder, check_image_size};
use crate::precision::soonest;
use crate::task::Stage2Task;

/// Images that go through the model together.
const BATCH: usize = 16;

/// A stage-2 model with its tokenizer, ready to caption.
pub struct Captioner {
    encoder: ImageEncoder,
    task: Stage2Task,
    tokenizer: TextEncoder,
    tokenizer_file: PathBuf,
    eos: Vec<i64>,
    /// What stands behind the queries where there is no prompt.
    empty_prompt: Vec<i64>,
    /// What stands in front of every prompt.
    first: Option<i64>,
    /// Tokens behind the queries for which the language model has positions, where these end.
    max_tokens: Option<usize>,
}

/// How captions are written.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptionOptions {
    /// At most so many new tokens.
    pub max_new_tokens: usize,
    /// No end token before so many.
    pub min_new_tokens: usize,
    /// The choice of tokens.
    pub decoding: Decoding,
}

/// What the model says of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caption {
    /// The image's file, as it was given.
    pub image: PathBuf,
    /// The new tokens, cut before the end token.
    pub ids: Vec<i64>,
    /// Their text without special tokens and surrounding white space.
    pub text: String,
}

impl Captioner {
    /// Loads a Hugging Face directory of a whole stage-2 model.
    ///
    /// The frozen towers are stored in `precision`, else in the dtype that `config.json` names (fp32 where it names none), or in fp32 on a processor
    /// that has no instructions for that.
    ///
    /// # Errors
    /// Files that are missing or damaged, a stage-1 model, token ids outside the vocabulary.
    pub fn open(
        source: impl Into<WeightsSource>,
        device: Device,
        precision: Option<Precision>,
    ) -> Result<Captioner, Error> {
        let source = source.into();
        let (files, dir) = (ModelFiles::open(&source)?, &*source);
        check_image_size(&files.config.vision, files.preprocessing.size)?;
        let kind = match precision {
            Some(precision) => {
                precision.set_tf32();
                precision.kind()
            }
            None => soonest(stored_kind(&dir.join("config.json"))?, device),
        };
        let task = files.stage2_task(device, kind)?;
        let language = files.config.language.as_ref().ok_or_else(|| Error::file(dir, "text_config: missing"))?;
        let before_queries = files.config.top.before_queries.as_deref();
        // Without our key the directory is read as transformers reads it: queries first, then what the tokenizer gives. An encoder-decoder's
        // always is: training gave it the same.
        let as_transformers = before_queries.is_none() || matches!(language, LanguageConfig::T5(_));
        let trained_with_opt = !as_transformers && language.caption_frame() == Some(CaptionFrame::Opt);
        let captioner = Captioner {
            encoder: files.image_encoder(device, kind)?,
            tokenizer: files.tokenizer(usize::MAX, as_transformers)?,
            tokenizer_file: dir.join("tokenizer.json"),
            eos: end_tokens(dir, language)?,
            empty_prompt: if as_transformers { language.bos_token_id().into_iter().collect() } else { Vec::new() },
            first: language.bos_token_id().filter(|_| trained_with_opt),
            max_tokens: task.text_positions(),
            task,
        };
        let config_file = dir.join("config.json");
        captioner.check_ids(&config_file, "before_queries", before_queries.unwrap_or_default())?;
        captioner.check_ids(&config_file, "text_config.bos_token_id", &captioner.empty_prompt)?;
        captioner.check_ids(dir, "eos_token_id", &captioner.eos)?;
        Ok(captioner)
    }

    /// How pictures become pixels.
    pub fn preprocessing(&self) -> &Preprocessing {
        self.encoder.preprocessing()
    }

    /// Captions images batch by batch, in order: each item holds the captions of one batch.
    ///
    /// `prompts`: none, one for all images, or one for each.
    ///
    /// # Errors
    /// As many prompts as neither fits. An item is an error where an image cannot be read or a prompt not tokenised.
    pub fn caption<'a>(
        &'a self,
        images: &'a [PathBuf],
        prompts: &[String],
        options: &'a CaptionOptions,
    ) -> Result<impl Iterator<Item = Result<Vec<Caption>, Error>> + 'a, Error> {
        let ids = prompts.iter().map(|prompt| self.prompt_ids(prompt)).collect::<Result<Vec<_>, Error>>()?;
        let ids = match ids.as_slice() {
            [] => vec![self.prompt_ids("")?; images.len()],
            [one] => vec![one.clone(); images.len()],
            _ if ids.len() == images.len() => ids,
            _ => {
                let message = "prompts: expected none, one, or one for each of the";
                return Err(Error::Mismatch(format!("{message} {} images, got {}", images.len(), ids.len())));
            }
        };
        let longest = ids.iter().map(Vec::len).max().unwrap_or(0) + options.max_new_tokens;
        if let Some(room) = self.max_tokens.filter(|&room| longest > room) {
            let message = "positions behind the queries, expected prompt and max_new_tokens within them, got";
            let advice = "ask for fewer tokens, or with a shorter prompt";
            return Err(Error::Mismatch(format!("the language model has {room} {message} {longest}; {advice}")));
        }
        let batches = images.chunks(BATCH).enumerate();
        Ok(batches.map(move |(batch, images)| {
            let first = batch * BATCH;
            self.caption_batch(batch, images, &ids[first..first + images.len()], options)
        }))
    }

    fn caption_batch(
        &self,
        batch: usize,
        images: &[PathBuf],
        prompts: &[Vec<i64>],
        options: &CaptionOptions,
    ) -> Result<Vec<Caption>, Error> {
        let preprocessing = self.encoder.preprocessing();
        let pixels = read_images(images, preprocessing)?;
        let features = self.encoder.features(&pixels, images.len(), preprocessing.size)?;
        let options = GenerateOptions {
            max_new_tokens: options.max_new_tokens,
            min_new_tokens: options.min_new_tokens,
            eos: self.eos.clone(),
            decoding: of_batch(options.decoding, batch),
        };
        let texts = self.task.write(&features, prompts, None, &options);
        let captions = images.iter().zip(texts).map(|(image, ids)| {
            let text = written(&self.tokenizer, &ids)?;
            Ok(Caption { image: image.clone(), ids, text })
        });
        captions.collect()
    }

    /// The ids behind the queries, without a space at the end, as in training.
    fn prompt_ids(&self, prompt: &str) -> Result<Vec<i64>, Error> {
        let encoded = self.tokenizer.encode(trimmed(prompt))?.into_iter().map(i64::from);
        let ids: Vec<i64> = self.first.into_iter().chain(encoded).collect();
        self.check_ids(&self.tokenizer_file, &format!("prompt {prompt:?}"), &ids)?;
        Ok(if ids.is_empty() { self.empty_prompt.clone() } else { ids })
    }

    fn check_ids(&self, file: &Path, key: &str, ids: &[i64]) -> Result<(), Error> {
        let vocabulary = self.task.vocabulary as i64;
        match ids.iter().find(|&&id| !(0..vocabulary).contains(&id)) {
            None => Ok(()),
            Some(id) => Err(Error::file(
                file,
                format!("{key}: expected ids below the vocabulary's size of {vocabulary}, got {id}"),
            )),
        }
    }
}

/// Draws are keyed by the place in the batch, so each batch has its own seed.
fn of_batch(decoding: Decoding, batch: usize) -> Decoding {
    match decoding {
        Decoding::Nucleus { top_k, top_p, temperature, seed } => {
            Decoding::Nucleus { top_k, top_p, temperature, seed: seed ^ ((batch as u64) << 32) }
        }
        other => other,
    }
}

/// Decodes files side by side and squeezes them into the model's square; one that has this size already stays as it is.
///
/// # Shapes
/// Returns `u8 [B, 3, size, size]`, flat.
fn read_images(paths: &[PathBuf], preprocessing: &Preprocessing) -> Result<Vec<u8>, Error> {
    let read = |path: &PathBuf| {
        let bytes = fs::read(path).map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
        let image = decode(&bytes).map_err(|error| Error::file(path, error))?;
        Ok(evaluate_transform(&image, preprocessing.size, preprocessing.filter))
    };
    let images: Vec<Result<Vec<u8>, Error>> = paths.par_iter().map(read).collect();
    // The first that failed is told, whichever thread was faster.
    Ok(images.into_iter().collect::<Result<Vec<_>, Error>>()?.concat())
}

/// What ends a text: the ids of `generation_config.json`, else the language model's own.
fn end_tokens(dir: &Path, language: &LanguageConfig) -> Result<Vec<i64>, Error> {
    let path = dir.join("generation_config.json");
    if !path.exists() {
        return Ok(language.eos_token_ids());
    }
    let config = read_json(&path)?;
    let id = |value: &Value| {
        value
            .as_i64()
            .ok_or_else(|| Error::file(&path, format!("eos_token_id: expected an id or a list of ids, got {value}")))
    };
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(language.eos_token_ids()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}

/// The dtype that `config.json` names, under its new or its old key.
fn stored_kind(path: &Path) -> Result<Kind, Error> {
    let config = read_json(path)?;
    let named = ["dtype", "torch_dtype"].iter().find_map(|&key| config.get(key).filter(|value| !value.is_null()));
    match named.map(|value| value.as_str().unwrap_or_default()) {
        None | Some("float32") => Ok(Kind::Float),
        Some("bfloat16") => Ok(Kind::BFloat16),
        Some("float16") => Ok(Kind::Half),
        Some(_) => {
            let got = named.unwrap_or(&Value::Null);
            Err(Error::file(path, format!("dtype: expected float32, bfloat16 or float16, got {got}")))
        }
    }
}

fn read_json(path: &Path) -> Result<Value, Error> {
    let bytes = fs::read(path).map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::file(path, format!("invalid JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use blip2_model::vision::VisionConfig;

    use super::*;
    use crate::config::AutoOr;

    #[test]
    fn batches_draw_differently_and_the_first_has_the_seed_itself() {
        let nucleus = |seed| Decoding::Nucleus { top_k: None, top_p: 0.9, temperature: 1.0, seed };
        assert_eq!(of_batch(nucleus(7), 0), nucleus(7));
        assert_ne!(of_batch(nucleus(7), 1), of_batch(nucleus(8), 0));
        assert_eq!(of_batch(Decoding::Greedy, 3), Decoding::Greedy);
    }

    #[test]
    fn the_first_image_that_cannot_be_read_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..9).map(|i| folder.path().join(format!("{i}.png"))).collect();
        fs::write(&paths[0], b"no picture").unwrap();
        let vision = VisionConfig::from_json(&serde_json::json!({})).unwrap();
        let preprocessing = Preprocessing::of(folder.path(), &vision, &AutoOr::Given(8)).unwrap();
        let message = read_images(&paths, &preprocessing).unwrap_err().to_string();
        assert!(message.contains("0.png: neither JPEG, PNG nor WebP"), "{message}");
    }

    #[test]
    fn the_dtype_is_the_one_that_the_directory_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let kind = |text: &str| {
            fs::write(&path, text).unwrap();
            stored_kind(&path).map_err(|error| error.to_string())
        };
        assert_eq!(kind("{}"), Ok(Kind::Float));
        assert_eq!(kind(r#"{"torch_dtype": "float16"}"#), Ok(Kind::Half));
        assert_eq!(kind(r#"{"dtype": "bfloat16", "torch_dtype": "float16"}"#), Ok(Kind::BFloat16));
        assert!(kind(r#"{"dtype": "int8"}"#).unwrap_err().contains("got \"int8\""));
    }
}
