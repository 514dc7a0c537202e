//! ITC and its hard negatives over more samples than a forward pass holds, with the large batch's exact gradient
//! (GradCache: Gao, Zhang, Han, Callan, 2021).
//!
//! ```text
//! 1  every micro-batch forward, without gradients      embeddings of the own slice
//! 2  ITC of all of them against all ranks'             its value, dL/d(embeddings), dL/d(temp); negatives
//! 3  every micro-batch forward and backward            <embeddings, dL/d(embeddings)> stands for ITC; ITM and ITG as ever
//! ```
//!
//! Both forward passes drop the same: dropout is keyed by sample and site, and where a GPU draws its masks it begins each micro-batch anew.

use blip2_losses::itm;
use blip2_model::qformer::TextBatch;
use blip2_torchx::autocast::autocast;
use tch::{Kind, Tensor, no_grad};

use super::stage1::{Columns, Contrast, Rows, Stage1Output, Stage1Task};
use super::{ForwardOptions, Losses};
use crate::data::batch::Batch;
use crate::error::Error;
use crate::masks::StepMasks;
use crate::ranks::Ranks;

/// Where the micro-batches of a step find their negatives.
struct Samples {
    /// Of the own slice, `[B, N, width]`, in a dtype that holds them exactly.
    features: Tensor,
    /// Texts of all ranks.
    texts: TextBatch,
}

/// A micro-batch against all samples of the step.
struct Part {
    contrast: Contrast,
    /// Gradient of its ITC, by image and query `[b, queries, E]`, by text `[b, E]`, and by the temperature `[]`.
    gradients: [Tensor; 3],
}

impl Stage1Task {
    /// The losses of a step's micro-batches, contrasted with all of the step.
    pub(super) fn cached_step(
        &self,
        mut batches: Vec<Batch>,
        pass: &ForwardOptions,
        ranks: &dyn Ranks,
        each: &mut dyn FnMut(Losses, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let ranks = self.negatives_of(ranks);
        let features = gather_features(&mut batches);
        let masks = StepMasks::new(features.device())?;
        let parts = self.survey(&batches, pass, &masks, ranks)?;
        let own = TextBatch::cat(&batches.iter().map(|batch| &batch.text).collect::<Vec<_>>());
        let texts = TextBatch { ids: ranks.gather(&own.ids)?, mask: ranks.gather(&own.mask)? };
        let samples = Samples { features, texts };
        for (number, (batch, part)) in batches.iter().zip(parts).enumerate() {
            masks.begin(number)?;
            let losses = self.surveyed(batch, part, &samples, pass, ranks)?;
            each(losses, number + 1 == batches.len())?;
        }
        Ok(())
    }

    fn survey(
        &self,
        batches: &[Batch],
        pass: &ForwardOptions,
        masks: &StepMasks,
        ranks: &dyn Ranks,
    ) -> Result<Vec<Part>, Error> {
        let forward = |(number, batch): (usize, &Batch)| {
            masks.begin(number)?;
            Ok(autocast(batch.features.device(), pass.autocast, || {
                let dropout = batch.dropout(pass.dropout, pass.seed);
                let trunk = self.model.forward(&batch.features, &batch.text, &dropout);
                (trunk.image_embeds, trunk.text_embeds)
            }))
        };
        let embeddings: Vec<(Tensor, Tensor)> =
            no_grad(|| batches.iter().enumerate().map(forward).collect::<Result<_, Error>>())?;
        let (images, texts): (Vec<&Tensor>, Vec<&Tensor>) =
            embeddings.iter().map(|(image, text)| (image, text)).unzip();
        let ids: Vec<&Tensor> = batches.iter().map(|batch| &batch.image_ids).collect();
        let (images, texts, ids) = (Tensor::cat(&images, 0), Tensor::cat(&texts, 0), Tensor::cat(&ids, 0));
        let columns = Columns::gather(&Rows { images: &images, texts: &texts, ids: &ids }, ranks)?;
        let mut parts = Vec::new();
        let mut at = 0;
        for (batch, embeddings) in batches.iter().zip(&embeddings) {
            parts.push(self.compare(batch, at, embeddings, &columns)?);
            at += batch.size();
        }
        Ok(parts)
    }

    /// A micro-batch by itself, as a rank that holds no more would do it: its numbers do not depend on who holds the others.
    fn compare(
        &self,
        batch: &Batch,
        at: i64,
        (images, texts): &(Tensor, Tensor),
        all: &Columns,
    ) -> Result<Part, Error> {
        let [images, texts] = [images, texts].map(|rows| rows.detach().set_requires_grad(true));
        let rows = Rows { images: &images, texts: &texts, ids: &batch.image_ids };
        let contrast = self.contrast(&rows, at, all, &batch.negatives);
        let gradients = Tensor::f_run_backward(&[&contrast.loss], &[&images, &texts, &self.model.temp], false, false)?;
        let contrast = Contrast { loss: contrast.loss.detach(), ..contrast };
        Ok(Part { contrast, gradients: gradients.try_into().expect("as many as were asked for") })
    }

    /// The losses of a micro-batch.
    fn surveyed(
        &self,
        batch: &Batch,
        Part { contrast, gradients: [of_images, of_texts, of_temp] }: Part,
        samples: &Samples,
        pass: &ForwardOptions,
        ranks: &dyn Ranks,
    ) -> Result<Losses, Error> {
        let device = batch.features.device();
        autocast(device, pass.autocast, || {
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let trunk = self.model.forward(&batch.features, &batch.text, &dropout);
            let product = |x: &Tensor, gradient: &Tensor| (x * gradient).sum(Kind::Float);
            // The temperature takes part in every backward pass, so that ranks that exchange gradients find it in the last.
            let stand_in = product(&trunk.image_embeds, &of_images)
                + product(&trunk.text_embeds, &of_texts)
                + &self.model.temp * of_temp;

            let (itg, itg_accuracy) = self.generation(&trunk, batch);
            let features = ranks.fetch(&samples.features, &contrast.negative_image)?;
            let negatives = self.model.negatives_from(&features, samples.texts.select(&contrast.negative_text));
            let itm_logits = self.model.match_pairs(&trunk, &batch.text, &negatives, &dropout);
            let itm = autocast(device, None, || itm::loss(&itm_logits));

            let total = self.total([&stand_in, &itm, &itg], batch.share);
            let shown = no_grad(|| self.total([&contrast.loss, &itm, &itg], batch.share));
            let out = Stage1Output { contrast, itm, itg, itm_logits, itg_accuracy };
            Ok(Losses { metrics: self.metrics(&out, &shown, batch.share), total })
        })
    }
}

/// The features of all micro-batches, which hold views of them from then on: one copy, in a dtype that holds them exactly.
fn gather_features(batches: &mut [Batch]) -> Tensor {
    let parts: Vec<Tensor> = batches.iter().map(|batch| batch.features.to_kind(batch.sent_as)).collect();
    let all = Tensor::cat(&parts, 0);
    let mut first = 0;
    for batch in batches {
        batch.features = all.narrow(0, first, batch.size());
        first += batch.size();
    }
    all
}
