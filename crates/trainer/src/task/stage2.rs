//! Stage 2: the language-modelling loss through a frozen language model (BLIP-2, section 3.3).

use blip2_losses::{itg, lm};
use blip2_model::dropout::DropoutRates;
use blip2_model::language::{Decoding, GenerateOptions, LanguageModel};
use blip2_model::{Dropout, Frozen, Stage2, Stage2Texts};
use blip2_torchx::autocast::autocast;
use blip2_torchx::params::ParamStore;
use tch::{Kind, Tensor};

use super::{Evaluation, ForwardOptions, HeldOut, Losses, Reference, TargetRule, Task};
use crate::data::batch::Batch;
use crate::data::text::written;
use crate::error::Error;
use crate::evaluation::{Means, SampleText};
use crate::ranks::{Ranks, share};

/// Sample captions of an evaluation are no longer.
const MAX_SAMPLE_TOKENS: usize = 30;

/// The model of stage 2 with its loss.
pub struct Stage2Task {
    /// What is trained.
    pub model: Stage2,
    /// Its parameters.
    pub params: ParamStore,
    /// The frozen language model.
    pub language: Frozen<LanguageModel>,
    /// The rates of the language model's dropout while training.
    pub language_dropout: DropoutRates,
    /// What the language model reads behind the queries before it writes a caption of its own.
    pub prompt: Vec<i64>,
    /// Tokens at the beginning of the target text that are no targets.
    pub untargeted: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Tokens that end a caption.
    pub end_tokens: Vec<i64>,
}

impl Stage2Task {
    /// Logits of the labelled tokens, `[M, V]`.
    fn logits(&self, batch: &Batch, pass: &ForwardOptions, language_dropout: DropoutRates) -> Tensor {
        let device = batch.features.device();
        autocast(device, pass.autocast, || {
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let prompt = self.model.soft_prompt(&batch.features, &self.language, &dropout);
            let dropout = batch.language_dropout(language_dropout, pass.seed);
            let texts =
                Stage2Texts { read: &batch.text, targets: &batch.targets.ids, labelled: &batch.targets.positions };
            // The frozen model computes in the dtype of its weights, whatever the run's precision.
            autocast(device, None, || self.model.text_logits(&prompt, &texts, &self.language, &dropout))
        })
    }

    /// Positions of the language model behind the queries, for prompt and text; none where they do not end.
    pub fn text_positions(&self) -> Option<usize> {
        self.language.max_positions().map(|longest| (longest - self.model.prompt_rows()).max(0) as usize)
    }

    /// New token ids for each picture behind its prompt, the trained part in `precision`.
    ///
    /// # Shapes
    /// `features [B, N, width]`; one prompt a picture.
    pub fn write(
        &self,
        features: &Tensor,
        prompts: &[Vec<i64>],
        precision: Option<Kind>,
        options: &GenerateOptions,
    ) -> Vec<Vec<i64>> {
        let device = features.device();
        tch::no_grad(|| {
            autocast(device, precision, || {
                let soft = self.model.soft_prompt(features, &self.language, &Dropout::off());
                autocast(device, None, || Stage2::continue_prompts(&soft, prompts, &self.language, options))
            })
        })
    }

    /// The loss with this dropout inside the language model.
    fn losses(&self, batch: &Batch, pass: &ForwardOptions, language_dropout: DropoutRates) -> Losses {
        let logits = self.logits(batch, pass, language_dropout);
        let loss = lm::loss(&logits, &batch.targets.labels);
        let total = &loss * batch.share.tokens;
        let accuracy = tch::no_grad(|| itg::accuracy(&logits, &batch.targets.labels) * batch.share.tokens);
        Losses {
            metrics: vec![("loss", total.detach()), ("loss_lm", total.detach()), ("lm_accuracy", accuracy)],
            total,
        }
    }
}

impl Task for Stage2Task {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn frozen(&self) -> Option<&ParamStore> {
        Some(self.language.params())
    }

    fn as_stage2(&self) -> Option<&Stage2Task> {
        Some(self)
    }

    /// Samples know nothing of each other: nothing is asked of other ranks.
    fn forward(&self, batch: &Batch, pass: &ForwardOptions, _: &dyn Ranks) -> Result<Losses, Error> {
        Ok(self.losses(batch, pass, self.language_dropout))
    }

    fn target_rule(&self) -> TargetRule {
        TargetRule { untargeted: self.untargeted }
    }

    fn reference(&self, metric: &str, _batch: usize) -> Option<Reference> {
        (metric == "loss_lm").then(|| Reference { chance: lm::chance(self.vocabulary), floor: 0.0 })
    }

    /// The loss, and greedy captions of the first pictures.
    fn evaluate(&self, held_out: &mut HeldOut, pass: &ForwardOptions) -> Result<Evaluation, Error> {
        tch::no_grad(|| {
            let pass = ForwardOptions { dropout: 0.0, ..*pass };
            let room = self.text_positions().map_or(usize::MAX, |room| room.saturating_sub(self.prompt.len()));
            let options = GenerateOptions {
                max_new_tokens: MAX_SAMPLE_TOKENS.min(room),
                min_new_tokens: 1,
                eos: self.end_tokens.clone(),
                decoding: Decoding::Greedy,
            };
            let mut means = Means::default();
            let mut evaluation = Evaluation::default();
            while let Some(batch) = held_out.next_batch() {
                let (batch, host) = batch?;
                means.add(&self.losses(&batch, &pass, DropoutRates::default()).metrics, host.size);
                evaluation.samples += host.size;
                let wanted = held_out.captions().saturating_sub(evaluation.texts.len()).min(host.size);
                if wanted == 0 {
                    continue;
                }
                let features = batch.features.narrow(0, 0, wanted as i64);
                let ids = self.write(&features, &vec![self.prompt.clone(); wanted], pass.autocast, &options);
                for (row, ids) in ids.iter().enumerate() {
                    evaluation.texts.push(SampleText {
                        index: host.sample_index[row],
                        truth: host.captions[row].clone(),
                        said: written(&held_out.text().encoder, ids)?,
                    });
                }
            }
            evaluation.scalars = means.finish(held_out.ranks())?;
            // The first pictures of the set, whichever rank had them: the first rank may have had few, or none that could be read.
            evaluation.texts = share(held_out.ranks(), &evaluation.texts)?.concat();
            evaluation.texts.truncate(held_out.captions());
            evaluation.samples =
                held_out.ranks().share_numbers(&[evaluation.samples as u64])?.iter().map(|n| n[0] as usize).sum();
            Ok(evaluation)
        })
    }
}
