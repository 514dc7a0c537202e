//! The whole model: picture to features to queries to prefix to caption.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::attention::linear;
use crate::language::{LanguageModel, Limits, greedy};
use crate::llama::Llama;
use crate::model_dir::{end_tokens, read_json, token_ids, weights};
use crate::picture::Preprocessing;
use crate::qformer::QFormer;
use crate::t5::T5;
use crate::vision::VisionTower;

/// An exported stage-2 model.
pub struct Captioner {
    device: Device,
    preprocessing: Preprocessing,
    vision: VisionTower,
    qformer: QFormer,
    language_projection: Linear,
    language: Box<dyn LanguageModel>,
    tokenizer: Tokenizer,
    /// Tokens in front of the queries, where `config.json` has the key.
    before_queries: Option<Vec<u32>>,
    bos: Option<u32>,
    vocab_size: u64,
    /// Tokens that end a caption.
    pub eos: Vec<u32>,
}

/// What the model says of an image, as `blip2 generate --json` prints it.
#[derive(Serialize)]
pub struct Caption<'a> {
    image: &'a Path,
    ids: Vec<u32>,
    text: String,
}

impl Captioner {
    /// Loads the directory that `blip2 export` wrote.
    pub fn load(dir: &Path) -> Result<Captioner> {
        let device = Device::Cpu;
        let config = read_json(&dir.join("config.json"))?;
        let text_config = &config["text_config"];
        let vb = weights(dir, &device)?;
        let vision = VisionTower::load(&config, vb.pp("vision_model"))?;
        let qformer = QFormer::load(&config, vb.clone())?;
        let language = vb.pp("language_model");
        let (language, width): (Box<dyn LanguageModel>, _) = match text_config["model_type"].as_str() {
            Some("llama") => (Box::new(Llama::load(text_config, language)?), &text_config["hidden_size"]),
            Some("t5") => (Box::new(T5::load(text_config, language)?), &text_config["d_model"]),
            Some(other) => bail!(
                "config.json: text_config.model_type: expected llama or t5, which this example computes, got {other}"
            ),
            None => bail!("config.json: text_config.model_type: missing; expected a stage-2 export"),
        };
        let width = width.as_u64().unwrap_or_default() as usize;
        let path = dir.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        tokenizer.with_padding(None).with_truncation(None).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let bos = text_config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(Captioner {
            preprocessing: Preprocessing::load(dir, &vision)?,
            language_projection: linear(qformer.hidden_size, width, vb.pp("language_projection"))?,
            vision,
            qformer,
            language,
            tokenizer,
            before_queries: token_ids(&config, "before_queries")?,
            bos,
            vocab_size: text_config["vocab_size"].as_u64().unwrap_or_default(),
            eos: end_tokens(dir, text_config)?,
            device,
        })
    }

    /// Captions one image file behind `prompt`, which may be empty.
    pub fn caption<'a>(&self, image: &'a Path, prompt: &str, limits: &Limits) -> Result<Caption<'a>> {
        let pixels = self.preprocessing.pixels(image, &self.device)?;
        let queries = self.qformer.forward(&self.vision.features(&pixels)?)?;
        let soft_prompt = self.language_projection.forward(&queries)?;
        let ids = greedy(self.language.as_ref(), &self.prefix(soft_prompt, prompt)?, limits)?;
        let text = self.tokenizer.decode(&ids, true).map_err(|error| anyhow!("tokenizer.json: {error}"))?;
        Ok(Caption { image, ids, text: text.trim().to_string() })
    }

    /// What the language model reads: `[before_queries | queries | prompt]`.
    ///
    /// A directory without `before_queries` was not trained by `blip2`: it is read as `transformers` reads it, queries first, then what the
    /// tokenizer makes of the prompt, special tokens included; BOS where that is nothing.
    fn prefix(&self, queries: Tensor, prompt: &str) -> Result<Tensor> {
        let special = self.before_queries.is_none();
        let encoding = self.tokenizer.encode_fast(prompt, special);
        let mut behind = encoding.map_err(|error| anyhow!("prompt {prompt:?}: {error}"))?.get_ids().to_vec();
        if behind.is_empty() && special {
            behind.extend(self.bos);
        }
        let front = self.before_queries.as_deref().unwrap_or_default();
        let mut rows = vec![queries];
        if !front.is_empty() {
            rows.insert(0, self.embed(front)?);
        }
        if !behind.is_empty() {
            rows.push(self.embed(&behind)?);
        }
        Ok(Tensor::cat(&rows, 1)?)
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        match ids.iter().find(|&&id| u64::from(id) >= self.vocab_size) {
            Some(id) => bail!("expected token ids below the vocabulary's size of {}, got {id}", self.vocab_size),
            None => self.language.embed(ids),
        }
    }
}
