//! Stage 2: the language-modelling loss through a frozen decoder (BLIP-2, section 3.3).

use blip2_losses::{itg, lm};
use blip2_model::language::LanguageModel;
use blip2_model::{Frozen, Stage2};
use blip2_torchx::autocast::autocast;
use blip2_torchx::params::ParamStore;
use tch::Tensor;

use super::{Losses, Pass, Reference, Task};
use crate::batch::{Batch, TargetRule};

/// The model of stage 2 with its loss.
pub struct Stage2Task {
    /// What is trained.
    pub model: Stage2,
    /// Its parameters.
    pub params: ParamStore,
    /// The frozen language model.
    pub language: Frozen<LanguageModel>,
    /// Tokens of the prompt between the queries and the caption, which are no targets.
    pub prompt_tokens: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
}

impl Stage2Task {
    /// Logits of the labelled tokens, `[M, V]`.
    fn logits(&self, batch: &Batch, pass: &Pass) -> Tensor {
        let device = batch.features.device();
        autocast(device, pass.autocast, || {
            let dropout = batch.dropout(pass.dropout, pass.seed);
            let prompt = self.model.soft_prompt(&batch.features, &self.language, &dropout);
            // The frozen model computes in the dtype of its weights, whatever the run's precision.
            autocast(device, None, || {
                self.model.text_logits(&prompt, &batch.text.ids, &batch.targets.positions, &self.language)
            })
        })
    }
}

impl Task for Stage2Task {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn forward(&self, batch: &Batch, pass: &Pass) -> Losses {
        let logits = self.logits(batch, pass);
        let loss = lm::loss(&logits, &batch.targets.labels);
        let total = &loss * batch.share.tokens;
        let accuracy = tch::no_grad(|| itg::accuracy(&logits, &batch.targets.labels) * batch.share.tokens);
        Losses { metrics: vec![("loss", total.detach()), ("loss_lm", total.detach()), ("lm_accuracy", accuracy)], total }
    }

    fn target_rule(&self) -> TargetRule {
        TargetRule { untargeted: self.prompt_tokens }
    }

    fn reference(&self, metric: &str, _batch: usize) -> Option<Reference> {
        (metric == "loss_lm").then(|| Reference { chance: lm::chance(self.vocabulary), floor: 0.0 })
    }
}
