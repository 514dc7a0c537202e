//! Stage 1: ITC, ITM and ITG from two trunk passes (BLIP-2, section 3.2).

use blip2_losses::{itc, itg, itm, smoothed_floor};
use blip2_model::Stage1;
use blip2_torchx::autocast::autocast;
use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor};

use super::{Evaluation, HeldOut, Losses, Pass, Reference, TargetRule, Task};
use crate::batch::{Batch, Negatives};
use crate::error::Error;
use crate::evaluation::{Means, SampleText};

/// The weights and constants of stage 1's losses.
#[derive(Debug, Clone, Copy)]
pub struct Stage1Options {
    /// Weight of ITC.
    pub itc: f64,
    /// Weight of ITM.
    pub itm: f64,
    /// Weight of ITG.
    pub itg: f64,
    /// Label smoothing of ITC and ITG.
    pub label_smoothing: f64,
    /// Added to the sampling weights of hard negatives.
    pub itm_weight_floor: f64,
}

impl Default for Stage1Options {
    /// The paper's.
    fn default() -> Self {
        Stage1Options { itc: 1.0, itm: 1.0, itg: 1.0, label_smoothing: 0.1, itm_weight_floor: 0.0 }
    }
}

/// The model of stage 1 with its losses.
pub struct Stage1Task {
    /// The model.
    pub model: Stage1,
    /// Its parameters.
    pub params: ParamStore,
    /// Weights and constants.
    pub options: Stage1Options,
}

/// Everything that stage 1 computes of a batch.
pub struct Stage1Output {
    /// Contrastive loss, 0-d.
    pub itc: Tensor,
    /// Matching loss, 0-d.
    pub itm: Tensor,
    /// Generation loss, 0-d.
    pub itg: Tensor,
    /// After the temperature, `[B, N]` both.
    pub similarities: itc::Similarities,
    /// f32 `[3B, 2]`: positive, negative image, negative text.
    pub itm_logits: Tensor,
    /// Share of labelled tokens ranked first, 0-d.
    pub itg_accuracy: Tensor,
}

impl Stage1Task {
    /// All losses of a batch, means over it.
    pub fn losses(&self, batch: &Batch, pass: &Pass) -> Stage1Output {
        let device = batch.features.device();
        // One outer region keeps the casts of the parameters for both trunk passes; losses step out of it.
        autocast(device, pass.autocast, || {
            let fp32 = |f: &mut dyn FnMut() -> Tensor| autocast(device, None, f);
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let trunk = self.model.forward(&batch.features, &batch.text, &dropout);

            let targets = Tensor::arange(batch.size(), (Kind::Int64, device));
            let same_image = itc::same_image_columns(&batch.image_ids, &batch.image_ids, &targets);
            let similarities = autocast(device, None, || {
                let (images, texts) = (&trunk.image_embeds, &trunk.text_embeds);
                itc::similarities(images, texts, images, texts, &self.model.temp)
            });
            let itc = fp32(&mut || itc::loss(&similarities, &targets, &same_image, self.options.label_smoothing));

            let draw = |similarity: &Tensor, uniform: &Tensor| {
                itm::sample_negatives(similarity, &same_image, &targets, uniform, self.options.itm_weight_floor)
            };
            let (negative_image, negative_text) = match &batch.negatives {
                // A negative image for each text, a negative text for each image.
                Negatives::Sample(image, text) => (draw(&similarities.t2i, image), draw(&similarities.i2t, text)),
                Negatives::Given(image, text) => (image.shallow_clone(), text.shallow_clone()),
            };
            let itm_logits = self.model.match_pairs(&trunk, &batch.text, &negative_image, &negative_text, &dropout);
            let itm = fp32(&mut || itm::loss(&itm_logits));

            // Row t of the generation text predicts token t + 1: each target is read one row before its own.
            let rows = trunk.generation.flatten(0, 1).index_select(0, &(&batch.targets.positions - 1));
            let logits = self.model.generation_logits(&rows);
            let labels = &batch.targets.labels;
            let itg = fp32(&mut || itg::loss(&logits, labels, self.options.label_smoothing));
            let itg_accuracy = tch::no_grad(|| itg::accuracy(&logits, labels));
            Stage1Output { itc, itm, itg, similarities, itm_logits, itg_accuracy }
        })
    }
}

impl Task for Stage1Task {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn forward(&self, batch: &Batch, pass: &Pass) -> Losses {
        let out = self.losses(batch, pass);
        let (o, share) = (&self.options, batch.share);
        let total = (&out.itc * o.itc + &out.itm * o.itm) * share.samples + &out.itg * (o.itg * share.tokens);
        let accuracy = |s: &Tensor| {
            let own = Tensor::arange(s.size()[0], (Kind::Int64, s.device()));
            s.argmax(-1, false).eq_tensor(&own).to_kind(Kind::Float).mean(Kind::Float)
        };
        let s = &out.similarities;
        let metrics = tch::no_grad(|| {
            vec![
                ("loss", total.detach()),
                ("loss_itc", out.itc.detach() * share.samples),
                ("loss_itm", out.itm.detach() * share.samples),
                ("loss_itg", out.itg.detach() * share.tokens),
                ("itc_accuracy", (accuracy(&s.i2t) + accuracy(&s.t2i)) * (0.5 * share.samples)),
                ("itm_accuracy", itm::accuracy(&out.itm_logits) * share.samples),
                ("itg_accuracy", &out.itg_accuracy * share.tokens),
                ("temperature", self.model.temp.detach() * share.samples),
            ]
        });
        Losses { total, metrics }
    }

    fn target_rule(&self) -> TargetRule {
        TargetRule { untargeted: 1 }
    }

    fn reference(&self, metric: &str, batch: usize) -> Option<Reference> {
        let smoothing = self.options.label_smoothing;
        let vocabulary = self.model.qformer.config().vocab_size as f64;
        match metric {
            "loss_itc" => {
                Some(Reference { chance: itc::chance(batch), floor: smoothed_floor(batch as f64, smoothing) })
            }
            "loss_itm" => Some(Reference { chance: itm::PRIOR, floor: 0.0 }),
            "loss_itg" => Some(Reference { chance: vocabulary.ln(), floor: smoothed_floor(vocabulary, smoothing) }),
            _ => None,
        }
    }

    /// Losses, and recall by ITC similarity over all of the set.
    fn evaluate(&self, held_out: &mut HeldOut, pass: &Pass) -> Result<Evaluation, Error> {
        tch::no_grad(|| {
            let pass = Pass { dropout: 0.0, ..*pass };
            let mut means = Means::default();
            let (mut images, mut texts, mut captions, mut indices, mut ids) = (vec![], vec![], vec![], vec![], vec![]);
            while let Some(batch) = held_out.next_batch() {
                let (batch, host) = batch?;
                // A batch of one has no negative.
                if host.size > 1 {
                    means.add(&self.forward(&batch, &pass).metrics, host.size);
                }
                let device = batch.features.device();
                autocast(device, pass.autocast, || {
                    images.push(self.model.embed_images(&batch.features));
                    texts.push(self.model.embed_texts(&batch.text));
                });
                captions.extend(host.captions);
                indices.extend(host.sample_index);
                ids.extend(host.image_id);
            }
            let mut evaluation = Evaluation { samples: captions.len(), scalars: means.finish(), ..Default::default() };
            if images.is_empty() || !held_out.retrieval() {
                return Ok(evaluation);
            }
            let texts = Tensor::cat(&texts, 0);
            let rows: Vec<Tensor> = images.iter().map(|images| itc::best_query(images, &texts)).collect();
            let similarity = Tensor::cat(&rows, 0);
            evaluation.add_recall(&similarity, &ids)?;
            let best = similarity.argmax(1, false);
            for row in 0..held_out.captions().min(captions.len()) {
                let found = best.int64_value(&[row as i64]) as usize;
                evaluation.texts.push(SampleText {
                    index: indices[row],
                    truth: captions[row].clone(),
                    said: captions[found].clone(),
                });
            }
            Ok(evaluation)
        })
    }
}
