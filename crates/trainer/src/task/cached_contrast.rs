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

use blip2_losses::{itc, itm};
use blip2_model::qformer::TextBatch;
use blip2_torchx::autocast::autocast;
use tch::{Kind, Tensor, no_grad};

use super::stage1::{Contrast, Rows, Stage1Output, Stage1Task};
use super::{Losses, Pass};
use crate::batch::{Batch, Negatives};
use crate::error::Error;
use crate::masks::StepMasks;
use crate::ranks::Ranks;

/// What the micro-batches of a step know of each other.
struct Survey {
    contrast: Contrast,
    /// Gradient of this rank's ITC, by image and query `[B, queries, E]`, by text `[B, E]`, and by the temperature `[]`.
    gradients: [Tensor; 3],
    /// Of the own slice, `[B, N, width]`, in a dtype that holds them exactly.
    features: Tensor,
    /// Texts of all ranks.
    texts: TextBatch,
}

impl Stage1Task {
    /// The losses of a step's micro-batches, contrasted with all of the step.
    pub(super) fn cached_step(
        &self,
        mut batches: Vec<Batch>,
        pass: &Pass,
        ranks: &dyn Ranks,
        each: &mut dyn FnMut(Losses, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let ranks = self.negatives_of(ranks);
        let features = gather_features(&mut batches);
        let masks = StepMasks::new(features.device())?;
        let survey = self.survey(&batches, features, pass, &masks, ranks)?;
        let mut first = 0;
        for (number, batch) in batches.iter().enumerate() {
            masks.begin(number)?;
            let losses = self.surveyed(batch, &survey, (first, batches.len()), pass, ranks)?;
            each(losses, number + 1 == batches.len())?;
            first += batch.size();
        }
        Ok(())
    }

    fn survey(
        &self,
        batches: &[Batch],
        features: Tensor,
        pass: &Pass,
        masks: &StepMasks,
        ranks: &dyn Ranks,
    ) -> Result<Survey, Error> {
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
        let cat = |parts: Vec<&Tensor>| Tensor::cat(&parts, 0);
        let leaf = |parts: Vec<&Tensor>| cat(parts).detach().set_requires_grad(true);
        let images = leaf(embeddings.iter().map(|(images, _)| images).collect());
        let texts = leaf(embeddings.iter().map(|(_, texts)| texts).collect());
        let ids = cat(batches.iter().map(|batch| &batch.image_ids).collect());
        let rows = Rows { images: &images, texts: &texts, ids: &ids };
        let contrast = self.contrast(&rows, &negatives(batches), ranks)?;
        let gradients = Tensor::f_run_backward(&[&contrast.loss], &[&images, &texts, &self.model.temp], false, false)
            .map_err(|error| Error::Mismatch(error.to_string()))?;
        let gradients: [Tensor; 3] = gradients.try_into().expect("as many as were asked for");
        let own = TextBatch::cat(&batches.iter().map(|batch| &batch.text).collect::<Vec<_>>());
        Ok(Survey {
            contrast,
            gradients,
            features,
            texts: TextBatch { ids: ranks.gather(&own.ids)?, mask: ranks.gather(&own.mask)? },
        })
    }

    /// The losses of the micro-batch that begins at row `first` of the own slice, one of `parts`.
    fn surveyed(
        &self,
        batch: &Batch,
        survey: &Survey,
        (first, parts): (i64, usize),
        pass: &Pass,
        ranks: &dyn Ranks,
    ) -> Result<Losses, Error> {
        let device = batch.features.device();
        autocast(device, pass.autocast, || {
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let trunk = self.model.forward(&batch.features, &batch.text, &dropout);
            let own = |rows: &Tensor| rows.narrow(0, first, batch.size());
            let [of_images, of_texts, of_temp] = &survey.gradients;
            let product = |x: &Tensor, gradient: &Tensor| (x * gradient).sum(Kind::Float);
            // The temperature takes part in every backward pass, so that ranks that exchange gradients find it in the last.
            let stand_in = product(&trunk.image_embeds, &own(of_images))
                + product(&trunk.text_embeds, &own(of_texts))
                + &self.model.temp * of_temp / parts as f64;

            let (itg, itg_accuracy) = self.generation(&trunk, batch);
            let Contrast { negative_image, negative_text, .. } = &survey.contrast;
            let features = ranks.fetch(&survey.features, &own(negative_image))?;
            let negatives = self.model.negatives_from(&features, survey.texts.select(&own(negative_text)));
            let itm_logits = self.model.match_pairs(&trunk, &batch.text, &negatives, &dropout);
            let itm = autocast(device, None, || itm::loss(&itm_logits));

            // Gradients of a mean over the slice, not over the micro-batch: as many times its share.
            let of_slice = survey.features.size()[0] as f64 / batch.size() as f64;
            let total = self.total([&(&stand_in * of_slice), &itm, &itg], batch.share);
            let itc = survey.contrast.loss.detach();
            let shown = no_grad(|| self.total([&itc, &itm, &itg], batch.share));
            let similarities = &survey.contrast.similarities;
            let contrast = Contrast {
                loss: itc,
                accuracy: survey.contrast.accuracy.shallow_clone(),
                similarities: itc::Similarities { i2t: own(&similarities.i2t), t2i: own(&similarities.t2i) },
                negative_image: own(negative_image),
                negative_text: own(negative_text),
            };
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

/// How the negatives of all micro-batches are drawn.
fn negatives(batches: &[Batch]) -> Negatives {
    let numbers = |batch: &Batch| match &batch.negatives {
        Negatives::Sample(image, text) | Negatives::Given(image, text) => (image.shallow_clone(), text.shallow_clone()),
    };
    let (images, texts): (Vec<Tensor>, Vec<Tensor>) = batches.iter().map(numbers).unzip();
    let (images, texts) = (Tensor::cat(&images, 0), Tensor::cat(&texts, 0));
    match batches[0].negatives {
        Negatives::Sample(..) => Negatives::Sample(images, texts),
        Negatives::Given(..) => Negatives::Given(images, texts),
    }
}
