//! Stage 1: ITC, ITM and ITG from two trunk passes (BLIP-2, section 3.2).

use blip2_losses::{itc, itg, itm, smoothed_floor};
use blip2_model::qformer::TextBatch;
use blip2_model::stage1::{PairNegatives, Stage1Pass};
use blip2_model::{Dropout, Stage1};
use blip2_torchx::autocast::autocast;
use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor};

use super::{Evaluation, ForwardOptions, HeldOut, Losses, Reference, TargetRule, Task, one_by_one};
use crate::data::batch::{Batch, Negatives, Share};
use crate::error::Error;
use crate::evaluation::retrieval;
use crate::ranks::{Alone, Ranks};
use crate::step::StepMetrics;

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
    /// Micro-batches are contrasted with all of their step (GradCache).
    pub cached: bool,
    /// Negatives are those of the own rank.
    pub local_negatives: bool,
}

impl Default for Stage1Options {
    /// The paper's.
    fn default() -> Self {
        Stage1Options {
            itc: 1.0,
            itm: 1.0,
            itg: 1.0,
            label_smoothing: 0.1,
            itm_weight_floor: 0.0,
            cached: false,
            local_negatives: false,
        }
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
    /// ITC and the negatives that were drawn by it.
    pub contrast: Contrast,
    /// Matching loss, 0-d.
    pub itm: Tensor,
    /// Generation loss, 0-d.
    pub itg: Tensor,
    /// f32 `[3B, 2]`: positive, negative image, negative text.
    pub itm_logits: Tensor,
    /// Share of labelled tokens ranked first, 0-d.
    pub itg_accuracy: Tensor,
}

/// Embeddings of the own samples, and which image each has.
pub(super) struct Rows<'a> {
    /// `[B, queries, E]`
    pub images: &'a Tensor,
    /// `[B, E]`
    pub texts: &'a Tensor,
    /// `i64 [B]`
    pub ids: &'a Tensor,
}

/// What rows are compared with: the samples of all ranks, detached.
pub(super) struct Columns {
    /// `[W B, queries, E]`
    images: Tensor,
    /// `[W B, E]`
    texts: Tensor,
    /// `i64 [W B]`
    ids: Tensor,
    /// The column of this rank's first sample.
    first: i64,
}

impl Columns {
    /// Those of this rank's rows and of every other rank's.
    pub(super) fn gather(rows: &Rows, ranks: &dyn Ranks) -> Result<Columns, Error> {
        Ok(Columns {
            images: ranks.gather(rows.images)?,
            texts: ranks.gather(rows.texts)?,
            ids: ranks.gather(rows.ids)?,
            first: ranks.rank() as i64 * rows.ids.size()[0],
        })
    }
}

/// What comes of comparing the own samples with those of all ranks.
pub struct Contrast {
    /// Contrastive loss, 0-d.
    pub loss: Tensor,
    /// Share of rows whose own column is the most similar, 0-d.
    pub accuracy: Tensor,
    /// After the temperature, `[B, N]` both; columns are the samples of all ranks.
    pub similarities: itc::Similarities,
    /// The rows' negative images among the samples of all ranks, `i64 [B]`.
    pub negative_image: Tensor,
    /// The same of texts.
    pub negative_text: Tensor,
}

/// A packed pass with what it was made of.
struct Packed<'a> {
    trunk: &'a Stage1Pass,
    batch: &'a Batch,
    dropout: &'a Dropout,
}

impl Stage1Task {
    /// All losses of a batch, means over it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn losses(&self, batch: &Batch, pass: &ForwardOptions, ranks: &dyn Ranks) -> Result<Stage1Output, Error> {
        let ranks = self.negatives_of(ranks);
        let device = batch.features.device();
        // One outer region keeps the casts of the parameters for both trunk passes; losses step out of it.
        autocast(device, pass.autocast, || {
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let trunk = self.model.forward(&batch.features, &batch.text, &dropout);
            let rows = Rows { images: &trunk.image_embeds, texts: &trunk.text_embeds, ids: &batch.image_ids };
            let contrast = self.contrast(&rows, 0, &Columns::gather(&rows, ranks)?, &batch.negatives);
            let (itg, itg_accuracy) = self.generation(&trunk, batch);
            // Behind the generation head: other ranks' images make the host wait.
            let itm_logits = self.match_pairs(&Packed { trunk: &trunk, batch, dropout: &dropout }, &contrast, ranks)?;
            let itm = autocast(device, None, || itm::loss(&itm_logits));
            Ok(Stage1Output { contrast, itm, itg, itm_logits, itg_accuracy })
        })
    }

    /// Those among whose samples negatives are looked for.
    pub(super) fn negatives_of<'a>(&self, ranks: &'a dyn Ranks) -> &'a dyn Ranks {
        if self.options.local_negatives { &Alone } else { ranks }
    }

    /// ITC of these rows against all columns, and their hard negatives. Their first is this rank's `at`-th sample.
    pub(super) fn contrast(&self, rows: &Rows, at: i64, columns: &Columns, negatives: &Negatives) -> Contrast {
        let device = rows.images.device();
        let (first, count) = (columns.first + at, rows.ids.size()[0]);
        let targets = Tensor::arange_start(first, first + count, (Kind::Int64, device));
        let same_image = itc::same_image_columns(rows.ids, &columns.ids, &targets);
        let (similarities, loss) = autocast(device, None, || {
            let s = itc::similarities(rows.images, rows.texts, &columns.images, &columns.texts, &self.model.temp);
            let loss = itc::loss(&s, &targets, &same_image, self.options.label_smoothing);
            (s, loss)
        });
        let accuracy = tch::no_grad(|| {
            let found = |s: &Tensor| s.argmax(-1, false).eq_tensor(&targets).to_kind(Kind::Float).mean(Kind::Float);
            (found(&similarities.i2t) + found(&similarities.t2i)) * 0.5
        });
        let draw = |similarity: &Tensor, uniform: &Tensor| {
            itm::sample_negatives(similarity, &same_image, &targets, uniform, self.options.itm_weight_floor)
        };
        let (negative_image, negative_text) = match negatives {
            // A negative image for each text, a negative text for each image.
            Negatives::Sample(image, text) => (draw(&similarities.t2i, image), draw(&similarities.i2t, text)),
            Negatives::Given(image, text) => (image.shallow_clone(), text.shallow_clone()),
        };
        Contrast { loss, accuracy, similarities, negative_image, negative_text }
    }

    /// ITG's loss and the share of tokens ranked first.
    pub(super) fn generation(&self, trunk: &Stage1Pass, batch: &Batch) -> (Tensor, Tensor) {
        // Row t of the generation text predicts token t + 1: each target is read one row before its own.
        let rows = trunk.generation.flatten(0, 1).index_select(0, &(&batch.targets.positions - 1));
        let logits = self.model.generation_logits(&rows);
        let labels = &batch.targets.labels;
        let loss = autocast(rows.device(), None, || itg::loss(&logits, labels, self.options.label_smoothing));
        (loss, tch::no_grad(|| itg::accuracy(&logits, labels)))
    }

    /// Matching logits with these negatives, `i64 [B]` among the samples of all ranks.
    fn match_pairs(&self, packed: &Packed, contrast: &Contrast, ranks: &dyn Ranks) -> Result<Tensor, Error> {
        let Packed { trunk, batch, dropout } = packed;
        let Contrast { negative_image, negative_text, .. } = contrast;
        if ranks.is_alone() {
            let negatives = self.model.negatives_within(trunk, &batch.text, negative_image, negative_text);
            return Ok(self.model.match_pairs(trunk, &batch.text, &negatives, dropout));
        }
        let all = TextBatch { ids: ranks.gather(&batch.text.ids)?, mask: ranks.gather(&batch.text.mask)? };
        let features = ranks.fetch(&batch.features.to_kind(batch.sent_as), negative_image)?;
        let negatives: PairNegatives = self.model.negatives_from(&features, all.select(negative_text));
        Ok(self.model.match_pairs(trunk, &batch.text, &negatives, dropout))
    }
}

impl Stage1Task {
    /// The weighted sum of (ITC, ITM, ITG), scaled to the micro-batch's share.
    pub(super) fn total(&self, [itc, itm, itg]: [&Tensor; 3], share: Share) -> Tensor {
        let o = &self.options;
        (itc * o.itc + itm * o.itm) * share.samples + itg * (o.itg * share.tokens)
    }

    pub(super) fn metrics(&self, out: &Stage1Output, total: &Tensor, share: Share) -> StepMetrics {
        tch::no_grad(|| {
            vec![
                ("loss", total.detach()),
                ("loss_itc", out.contrast.loss.detach() * share.samples),
                ("loss_itm", out.itm.detach() * share.samples),
                ("loss_itg", out.itg.detach() * share.tokens),
                ("itc_accuracy", &out.contrast.accuracy * share.samples),
                ("itm_accuracy", itm::accuracy(&out.itm_logits) * share.samples),
                ("itg_accuracy", &out.itg_accuracy * share.tokens),
                ("temperature", self.model.temp.detach() * share.samples),
            ]
        })
    }
}

impl Task for Stage1Task {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn forward(&self, batch: &Batch, pass: &ForwardOptions, ranks: &dyn Ranks) -> Result<Losses, Error> {
        let out = self.losses(batch, pass, ranks)?;
        let total = self.total([&out.contrast.loss, &out.itm, &out.itg], batch.share);
        Ok(Losses { metrics: self.metrics(&out, &total, batch.share), total })
    }

    fn step(
        &self,
        micro_batches: &mut dyn ExactSizeIterator<Item = Result<Batch, Error>>,
        pass: &ForwardOptions,
        ranks: &dyn Ranks,
        each: &mut dyn FnMut(Losses, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.options.cached {
            return self.cached_step(micro_batches.collect::<Result<_, _>>()?, pass, ranks, each);
        }
        one_by_one(micro_batches, &|batch| self.forward(batch, pass, ranks), each)
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

    /// Losses, and recall by ITC similarity over all of the set; by ITC and ITM where that is asked for.
    fn evaluate(&self, held_out: &mut HeldOut, pass: &ForwardOptions) -> Result<Evaluation, Error> {
        retrieval(self, held_out, pass)
    }
}
