//! One training step's forward and backward on a recorded batch, dropout off: parity with a reference, and the autopsy of a bad step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2_model::Blip2Config;
use blip2_model::language::{LanguageConfig, LanguageModel};
use blip2_model::qformer::{QFormerConfig, TextBatch};
use blip2_torchx::params::TensorSource;
use blip2_weights::{SafetensorsFile, save_safetensors};
use tch::{Device, Kind, Tensor};

use crate::assembly::model_files::ModelFiles;
use crate::config::{GradientExchange, Precision, Stage, WeightsSource};
use crate::data::batch::{Batch, Negatives, Share, TargetRule, Targets};
use crate::error::Error;
use crate::ranks::Ranks;
use crate::task::{ForwardOptions, Stage2Task, Task};

/// What `blip2 replay` is asked for.
#[derive(Debug, Clone)]
pub struct ReplayOptions {
    /// Hugging Face directory of the whole model.
    pub model: WeightsSource,
    /// Which stage's step.
    pub stage: Stage,
    /// The recorded batch.
    pub batch: PathBuf,
    /// Where losses and gradients go.
    pub out: PathBuf,
    /// Number format of the step.
    pub precision: Precision,
    /// Where to compute.
    pub device: Device,
}

/// Runs the step and writes its output file; returns the scalar losses for a summary. Of several ranks each has its batch: losses are its own,
/// gradients the mean over the ranks.
///
/// # Errors
/// A model or batch file that does not fit, tensors that are missing.
pub fn replay(options: &ReplayOptions, ranks: &dyn Ranks) -> Result<Vec<(String, f64)>, Error> {
    options.precision.set_tf32();
    ranks.exchange_on(options.device)?;
    let kind = options.precision.kind();
    let files = ModelFiles::open(&options.model)?;
    let file = BatchFile::read(&options.batch, options.device, ranks.world() as i64)?;
    let encoder = files.image_encoder(options.device, kind)?;
    let pixels = file.tensor("pixel_values")?;
    let side = pixels.size()[3];
    let wrong =
        |expected| Error::file(&options.batch, format!("pixel_values: expected a side of {expected}, got {side}"));
    files.config.vision.check_size(side).map_err(wrong)?;
    let features = encoder.features_of_normalised(&pixels);
    let pass = ForwardOptions { autocast: options.precision.autocast(), dropout: 0.0, seed: 0 };
    let mut out: BTreeMap<String, Tensor> = BTreeMap::new();
    let params = match options.stage {
        Stage::One => {
            let task = files.stage1_task(options.device, Default::default())?;
            let batch = file.stage1_batch(features, &files.config.qformer, task.target_rule(), ranks)?;
            let losses = task.losses(&batch, &pass, ranks)?;
            let loss = &losses.contrast.loss + &losses.itm + &losses.itg;
            ranks.gradients(&task.params, GradientExchange::Fp32)?.backward(&loss, true)?;
            for (name, tensor) in [
                ("loss", loss),
                ("loss_itc", losses.contrast.loss),
                ("loss_itm", losses.itm),
                ("loss_itg", losses.itg),
                ("sim_i2t", losses.contrast.similarities.i2t),
                ("sim_t2i", losses.contrast.similarities.t2i),
                ("itm_logits", losses.itm_logits),
            ] {
                out.insert(name.into(), tensor.detach());
            }
            task.params
        }
        Stage::Two => {
            let task = files.stage2_task(options.device, kind)?;
            file.check_positions(&files.config)?;
            let batch = file.stage2_batch(features, &files, &task)?;
            let losses = task.forward(&batch, &pass, ranks)?;
            ranks.gradients(&task.params, GradientExchange::Fp32)?.backward(&losses.total, true)?;
            out.insert("loss".into(), losses.total.detach());
            task.params
        }
    };
    let scalars = out.iter().filter(|(_, t)| t.dim() == 0).map(|(n, t)| (n.clone(), t.double_value(&[]))).collect();
    for (name, tensor, _) in params.entries() {
        let grad = tensor.grad();
        let grad = if grad.defined() { grad } else { tensor.zeros_like() };
        out.insert(format!("grad/{name}"), grad);
    }
    let entries: Vec<(String, Tensor)> =
        out.into_iter().map(|(n, t)| (n, t.detach().to_kind(Kind::Float).to_device(Device::Cpu))).collect();
    save_safetensors(&entries, &BTreeMap::new(), &options.out)?;
    Ok(scalars)
}

/// Whether every element holds; an empty tensor's do.
fn all(holds: &Tensor) -> bool {
    bool::try_from(holds.all()).unwrap_or(false)
}

/// A recorded batch.
struct BatchFile {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl BatchFile {
    fn read(path: &Path, device: Device, world: i64) -> Result<BatchFile, Error> {
        let file = SafetensorsFile::open(path)?;
        let mut tensors = BTreeMap::new();
        for (name, _) in file.entries() {
            let tensor = file.read(&name).map_err(|message| Error::file(path, message))?;
            tensors.insert(name, tensor.to_device(device));
        }
        let file = BatchFile { path: path.to_path_buf(), tensors };
        file.check(world)?;
        Ok(file)
    }

    /// Shapes that agree, so that no later product panics. Every rank's batch has as many samples.
    fn check(&self, world: i64) -> Result<(), Error> {
        let expect = |name: &str, ok: bool, expected: &str| {
            if ok {
                return Ok(());
            }
            let got =
                self.tensors.get(name).map_or_else(|| "nothing".into(), |t| format!("{:?} {:?}", t.kind(), t.size()));
            Err(Error::file(&self.path, format!("{name}: expected {expected}, got {got}")))
        };
        let shape = |name: &str| self.tensors.get(name).map(|t| (t.kind(), t.size()));
        let pixels = shape("pixel_values");
        let square = matches!(&pixels, Some((Kind::Float, s)) if s.len() == 4 && s[1] == 3 && s[2] == s[3] && s[0] > 0);
        expect("pixel_values", square, "f32 [B, 3, S, S]")?;
        let rows = pixels.map_or(0, |(_, s)| s[0]);
        let matrix = |name: &str| matches!(shape(name), Some((Kind::Int64, s)) if s.len() == 2 && s[0] == rows);
        expect("input_ids", matrix("input_ids"), &format!("i64 [{rows}, L]"))?;
        let like_ids = shape("input_ids");
        expect("attention_mask", shape("attention_mask") == like_ids, "the shape of input_ids, i64")?;
        let mask = &self.tensors["attention_mask"];
        expect("attention_mask", all(&mask.eq(0).logical_or(&mask.eq(1))), "0 and 1")?;
        if self.tensors.contains_key("labels") {
            expect("labels", matrix("labels"), &format!("i64 [{rows}, L]"))?;
        }
        for name in ["negative_image_index", "negative_text_index"] {
            let other = if name == "negative_text_index" { "negative_image_index" } else { "negative_text_index" };
            if !self.tensors.contains_key(name) && self.tensors.contains_key(other) {
                return Err(Error::file(&self.path, format!("{name}: missing beside {other}; give both, or none")));
            }
            if let Some(t) = self.tensors.get(name) {
                let fits =
                    t.kind() == Kind::Int64 && t.size() == [rows] && all(&t.ge(0).logical_and(&t.lt(rows * world)));
                expect(name, fits, &format!("i64 [{rows}], each from 0 to {}", rows * world - 1))?;
            }
        }
        Ok(())
    }

    /// Whether the language model has a position for every row.
    fn check_positions(&self, config: &Blip2Config) -> Result<(), Error> {
        let in_front =
            config.top.num_query_tokens + config.top.before_queries.as_ref().map_or(0, |ids| ids.len() as i64);
        let rows = in_front + self.tensor("input_ids")?.size()[1];
        match config.language.as_ref().and_then(|language| language.max_positions()).filter(|&longest| rows > longest) {
            None => Ok(()),
            Some(longest) => {
                let message =
                    format!("input_ids: expected at most {} tokens, got {}", longest - in_front, rows - in_front);
                Err(Error::file(&self.path, format!("{message}; the language model has {longest} positions")))
            }
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        self.tensors.get(name).map(Tensor::shallow_clone).ok_or_else(|| {
            Error::file(
                &self.path,
                format!(
                    "{name}: missing; a batch file has pixel_values, input_ids, attention_mask, and labels for stage 2"
                ),
            )
        })
    }

    /// The ids that a model has embeddings for.
    fn check_ids(&self, name: &str, ids: &Tensor, vocabulary: i64) -> Result<(), Error> {
        if all(&ids.ge(0).logical_and(&ids.lt(vocabulary))) {
            return Ok(());
        }
        Err(Error::file(&self.path, format!("{name}: expected ids from 0 to {}, got others", vocabulary - 1)))
    }

    fn stage1_batch(
        &self,
        features: Tensor,
        qformer: &QFormerConfig,
        rule: TargetRule,
        ranks: &dyn Ranks,
    ) -> Result<Batch, Error> {
        let mask = self.tensor("attention_mask")?;
        self.check_ids("input_ids", &self.tensor("input_ids")?, qformer.vocab_size)?;
        if mask.size()[0] * (ranks.world() as i64) < 2 {
            return Err(Error::file(
                &self.path,
                "pixel_values: expected at least 2 samples, since ITC and ITM take negatives from the batch, got 1",
            ));
        }
        // `[CLS]` is the first one, and what follows the longest text is cut off.
        self.check_padding(&mask)?;
        if mask.size()[1] == 0 {
            return Err(Error::file(&self.path, "input_ids: expected at least one token a text, got none"));
        }
        // Padding beyond the longest text changes nothing but the time.
        let longest = mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).max().int64_value(&[]).max(1);
        // Of one width on all ranks, which exchange them; as many samples on each.
        let said = ranks.share_numbers(&[longest as u64, mask.size()[0] as u64])?;
        if let Some(other) = said.iter().position(|rank| rank[1] != mask.size()[0] as u64) {
            let message = format!(
                "input_ids: expected as many rows as rank {other} has, {}, got {}",
                said[other][1],
                mask.size()[0]
            );
            return Err(Error::file(&self.path, message));
        }
        let widest = said.iter().map(|rank| rank[0] as i64).max().unwrap_or(longest);
        if widest > qformer.max_position_embeddings {
            let longest = qformer.max_position_embeddings;
            return Err(Error::file(
                &self.path,
                format!(
                    "input_ids: expected at most {longest} tokens, got {widest}; the Q-Former has {longest} positions"
                ),
            ));
        }
        let text = TextBatch::new(self.tensor("input_ids")?, &mask);
        let text = text.truncated(longest.min(text.tokens())).widened(widest, 0);
        let labels = text.ids.masked_fill(&text.mask.logical_not(), -100);
        let _ = labels.narrow(1, 0, rule.untargeted as i64).fill_(-100);
        let given = (self.tensors.get("negative_image_index"), self.tensors.get("negative_text_index"));
        let negatives = match given {
            (Some(image), Some(text)) => Negatives::Given(image.shallow_clone(), text.shallow_clone()),
            _ => {
                let uniform = || Tensor::rand([mask.size()[0]], (Kind::Float, mask.device()));
                Negatives::Sample(uniform(), uniform())
            }
        };
        let first_sample = ranks.rank() as i64 * mask.size()[0];
        self.batch(features, text, Targets::from_labels(&labels, 0), negatives, first_sample)
    }

    /// Real tokens come first: what stands behind them is cut off or seen by nobody.
    fn check_padding(&self, mask: &Tensor) -> Result<(), Error> {
        let columns = mask.size()[1];
        if columns < 2 || all(&mask.narrow(1, 0, columns - 1).ge_tensor(&mask.narrow(1, 1, columns - 1))) {
            return Ok(());
        }
        Err(Error::file(&self.path, "attention_mask: expected padding behind the text, got some in front of it"))
    }

    /// A decoder's labels are among its ids; an encoder-decoder's are a text of their own, which the decoder writes.
    fn stage2_batch(&self, features: Tensor, files: &ModelFiles, task: &Stage2Task) -> Result<Batch, Error> {
        let (ids, labels) = (self.tensor("input_ids")?, self.tensor("labels")?);
        if matches!(*task.language, LanguageModel::Decoder(_)) && labels.size() != ids.size() {
            let (expected, got) = (ids.size(), labels.size());
            return Err(Error::file(
                &self.path,
                format!("labels: expected i64 {expected:?}, as input_ids, got {got:?}"),
            ));
        }
        let targets = labels.masked_select(&labels.not_equal(-100));
        for (name, ids) in [("input_ids", &ids), ("labels", &targets)] {
            self.check_ids(name, ids, task.vocabulary as i64)?;
        }
        let mask = self.tensor("attention_mask")?;
        if matches!(*task.language, LanguageModel::Decoder(_)) {
            self.check_padding(&mask)?;
        }
        let text = TextBatch::new(ids, &mask);
        let none = || Tensor::zeros([0], (Kind::Float, features.device()));
        let negatives = Negatives::Sample(none(), none());
        let pad_id = files.config.language.as_ref().map_or(0, LanguageConfig::pad_token_id);
        self.batch(features, text, Targets::from_labels(&labels, pad_id), negatives, 0)
    }

    fn batch(
        &self,
        features: Tensor,
        text: TextBatch,
        targets: Targets,
        negatives: Negatives,
        first_sample: i64,
    ) -> Result<Batch, Error> {
        if targets.count == 0 {
            return Err(Error::file(&self.path, "no token is a target: expected at least one label other than -100"));
        }
        let rows = Tensor::arange(text.batch(), (Kind::Int64, features.device()));
        let image_ids = &rows + first_sample;
        Ok(Batch {
            sent_as: features.kind(),
            features,
            text,
            targets,
            positions: image_ids.shallow_clone(),
            image_ids,
            negatives,
            share: Share::WHOLE,
        })
    }
}
