//! Stage 2 (BLIP-2, section 3.3): the Q-Former's queries, projected, as a soft prompt of a frozen language model.

use blip2_torchx::params::Scope;
use tch::{Kind, Tensor};

use crate::config::Blip2Config;
use crate::dropout::Dropout;
use crate::language::{GenerateOptions, LanguageModel, generate};
use crate::layers::{LayerNorm, Linear};
use crate::qformer::{QFormer, TextBatch};

/// The texts of a batch, right-padded.
#[derive(Debug)]
pub struct Stage2Texts<'a> {
    /// What stands behind the queries: a decoder's whole text, an encoder-decoder's prompt and prefix.
    pub read: &'a TextBatch,
    /// The text that holds the targets, `i64 [B, T]`: a decoder's is the one that it reads.
    pub targets: &'a Tensor,
    /// Flat positions of the targets in `[B, T]`, `i64 [M]`.
    pub labelled: &'a Tensor,
}

/// Everything that stage 2 trains: the query half of the Q-Former, `ln_vision` and the projection.
#[derive(Debug)]
pub struct Stage2 {
    qformer: QFormer,
    ln_vision: LayerNorm,
    language_projection: Linear,
    before_queries: Vec<i64>,
}

impl Stage2 {
    /// Declares all trainable parameters below `root`.
    ///
    /// `language_width` is the width of the language model's embeddings; `before_queries` are the tokens in front of the queries.
    pub fn new(root: &Scope, config: &Blip2Config, language_width: i64, before_queries: Vec<i64>) -> Stage2 {
        let post_layernorm = root.pp("vision_model.post_layernorm");
        let hidden = config.qformer.hidden_size;
        Stage2 {
            qformer: QFormer::new(root, &config.qformer, config.top.num_query_tokens, false),
            ln_vision: LayerNorm::new(&post_layernorm, config.vision.hidden_size(), config.vision.layer_norm_eps()),
            language_projection: Linear::default_init(&root.pp("language_projection"), hidden, language_width),
            before_queries,
        }
    }

    /// What stands in front of the text, in the language model's dtype: the embedded tokens before the queries, then the projected queries.
    ///
    /// # Shapes
    /// `features [B, N, width] -> [B, before + queries, hidden of the language model]`.
    pub fn soft_prompt(&self, features: &Tensor, language: &LanguageModel, dropout: &Dropout) -> Tensor {
        let keys = self.qformer.image_keys(features, &self.ln_vision);
        let queries = self.language_projection.forward(&self.qformer.encode_images(&keys, dropout));
        let queries = queries.to_kind(language.kind());
        if self.before_queries.is_empty() {
            return queries;
        }
        let before = Tensor::from_slice(&self.before_queries).to_device(features.device());
        let before = language.embed(&before).unsqueeze(0).expand([features.size()[0], -1, -1], false);
        Tensor::cat(&[before, queries], 1)
    }

    /// Rows of the soft prompt.
    pub fn prompt_rows(&self) -> i64 {
        self.before_queries.len() as i64 + self.qformer.num_queries()
    }

    /// Logits of the labelled tokens; the vocabulary head runs on the rows that predict them only.
    ///
    /// A decoder continues the prompt with the text: row `t` is predicted from the row before it, its first from the last row of the prompt. An
    /// encoder-decoder encodes prompt and text, and its decoder writes the targets.
    ///
    /// # Shapes
    /// `prompt [B, P, hidden]`; `-> [M, vocabulary]`.
    pub fn text_logits(
        &self,
        prompt: &Tensor,
        texts: &Stage2Texts,
        language: &LanguageModel,
        dropout: &Dropout,
    ) -> Tensor {
        let read = Tensor::cat(&[prompt, &language.embed(&texts.read.ids)], 1);
        let predicting = |hidden: &Tensor| hidden.flatten(0, 1).index_select(0, texts.labelled);
        match language {
            LanguageModel::Decoder(model) => {
                let hidden = model.forward(&read, dropout);
                let before_text = hidden.narrow(1, prompt.size()[1] - 1, texts.read.tokens());
                model.logits(&predicting(&before_text))
            }
            LanguageModel::T5(model) => {
                let (batch, rows, _) = prompt.size3().expect("rank 3: [B, P, hidden]");
                let all = Tensor::ones([batch, rows], (Kind::Bool, prompt.device()));
                let mask = Tensor::cat(&[&all, &texts.read.mask], 1);
                model.logits(&predicting(&model.forward(&read, &mask, texts.targets, dropout)))
            }
        }
    }

    /// New token ids for each image behind its prompt of token ids, fp32 in the Q-Former.
    ///
    /// # Shapes
    /// `features [B, N, width]`; one prompt an image, possibly empty.
    pub fn generate(
        &self,
        features: &Tensor,
        prompts: &[Vec<i64>],
        language: &LanguageModel,
        options: &GenerateOptions,
    ) -> Vec<Vec<i64>> {
        let soft = tch::no_grad(|| self.soft_prompt(features, language, &Dropout::off()));
        Stage2::continue_prompts(&soft, prompts, language, options)
    }

    /// New token ids for each image behind its soft prompt and its prompt of token ids.
    ///
    /// # Shapes
    /// `soft [B, P, hidden]` from [`Stage2::soft_prompt`]; one prompt an image, possibly empty.
    pub fn continue_prompts(
        soft: &Tensor,
        prompts: &[Vec<i64>],
        language: &LanguageModel,
        options: &GenerateOptions,
    ) -> Vec<Vec<i64>> {
        tch::no_grad(|| {
            let prefix = |(image, ids): (usize, &Vec<i64>)| {
                let soft = soft.get(image as i64);
                if ids.is_empty() {
                    return soft;
                }
                let text = language.embed(&Tensor::from_slice(ids).to_device(soft.device()));
                Tensor::cat(&[soft, text], 0)
            };
            let prefixes: Vec<Tensor> = prompts.iter().enumerate().map(prefix).collect();
            generate(language, &prefixes, options)
        })
    }
}

/// Flat positions of labels other than `ignore` in `labels i64 [B, T]`.
pub fn labelled_positions(labels: &Tensor, ignore: i64) -> Tensor {
    labels.flatten(0, 1).not_equal(ignore).nonzero().squeeze_dim(-1).to_kind(Kind::Int64)
}
