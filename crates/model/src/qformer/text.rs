//! The Q-Former's text side: padded batches, embeddings, and the head that generates.

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use super::QFormerConfig;
use crate::layers::{LayerNorm, Linear};

/// Right-padded token ids.
#[derive(Debug)]
pub struct TextBatch {
    /// `i64 [B, T]`
    pub ids: Tensor,
    /// `bool [B, T]`, true at tokens
    pub mask: Tensor,
}

impl TextBatch {
    /// From ids and a 0/1 mask, both `i64 [B, T]`.
    pub fn new(ids: Tensor, attention_mask: &Tensor) -> TextBatch {
        TextBatch { ids, mask: attention_mask.to_kind(Kind::Bool) }
    }

    /// Samples.
    pub fn batch(&self) -> i64 {
        self.ids.size()[0]
    }

    /// Padded length T.
    pub fn tokens(&self) -> i64 {
        self.ids.size()[1]
    }

    /// The same with the padding beyond `tokens` cut off.
    pub fn truncated(&self, tokens: i64) -> TextBatch {
        TextBatch { ids: self.ids.narrow(1, 0, tokens), mask: self.mask.narrow(1, 0, tokens) }
    }

    /// The same with padding up to `tokens`; wider ones stay.
    pub fn widened(&self, tokens: i64, pad_id: i64) -> TextBatch {
        let more = (tokens - self.tokens()).max(0);
        let wider = |t: &Tensor, fill: i64| {
            Tensor::cat(&[t, &Tensor::full([self.batch(), more], fill, (t.kind(), t.device()))], 1)
        };
        TextBatch { ids: wider(&self.ids, pad_id), mask: wider(&self.mask, 0) }
    }

    /// Batches of one width, one after the other.
    pub fn cat(batches: &[&TextBatch]) -> TextBatch {
        let cat = |of: fn(&TextBatch) -> &Tensor| Tensor::cat(&batches.iter().map(|b| of(b)).collect::<Vec<_>>(), 0);
        TextBatch { ids: cat(|b| &b.ids), mask: cat(|b| &b.mask) }
    }

    /// Texts of the batch by index.
    pub fn select(&self, rows: &Tensor) -> TextBatch {
        TextBatch { ids: self.ids.index_select(0, rows), mask: self.mask.index_select(0, rows) }
    }
}

/// Word and position embeddings. Positions of text start at 0 whatever stands in front; there are no token types.
#[derive(Debug)]
pub struct TextEmbeddings {
    /// `[vocabulary, hidden]`, tied to the generation head.
    pub word_embeddings: Tensor,
    position_embeddings: Tensor,
}

impl TextEmbeddings {
    /// Declares both tables.
    pub fn new(scope: &Scope, c: &QFormerConfig) -> TextEmbeddings {
        let table = |name, rows| scope.pp(name).param("weight", &[rows, c.hidden_size], Init::Normal(0.02));
        TextEmbeddings {
            word_embeddings: table("word_embeddings", c.vocab_size),
            position_embeddings: table("position_embeddings", c.max_position_embeddings),
        }
    }

    /// `ids [B, T] -> [B, T, hidden]`, before the shared LayerNorm.
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        let words = Tensor::embedding(&self.word_embeddings, ids, -1, false, false);
        words + self.position_embeddings.narrow(0, 0, ids.size()[1])
    }

    /// Embeddings of a text as it is and with its first token replaced by `start`, from one lookup.
    pub fn forward_with_start(&self, ids: &Tensor, start: i64) -> (Tensor, Tensor) {
        let (batch, tokens) = ids.size2().expect("rank 2: [B, T]");
        let start = Tensor::full([1], start, (Kind::Int64, ids.device()));
        let all = Tensor::cat(&[ids.flatten(0, 1), start], 0);
        let words = Tensor::embedding(&self.word_embeddings, &all, -1, false, false);
        let words = words.split_with_sizes([batch * tokens, 1], 0);
        let positions = self.position_embeddings.narrow(0, 0, tokens);
        let cls = words[0].view([batch, tokens, -1]) + &positions;
        let first = (&words[1] + positions.narrow(0, 0, 1)).unsqueeze(0).expand([batch, -1, -1], false);
        let dec = Tensor::cat(&[first, cls.narrow(1, 1, tokens - 1)], 1);
        (cls, dec)
    }
}

/// BERT's masked-LM head, used for generation; its decoder is the word embedding table.
#[derive(Debug)]
pub struct TextHead {
    dense: Linear,
    layer_norm: LayerNorm,
    bias: Tensor,
}

impl TextHead {
    /// Declares `cls.predictions.*` below `root`.
    pub fn new(root: &Scope, c: &QFormerConfig) -> TextHead {
        let scope = root.pp("cls.predictions");
        TextHead {
            dense: Linear::bert(&scope.pp("transform.dense"), c.hidden_size, c.hidden_size),
            layer_norm: LayerNorm::new(&scope.pp("transform.LayerNorm"), c.hidden_size, c.layer_norm_eps),
            bias: scope.param("bias", &[c.vocab_size], Init::Zeros),
        }
    }

    /// `hidden [M, hidden] -> logits [M, vocabulary]`.
    pub fn forward(&self, hidden: &Tensor, embeddings: &TextEmbeddings) -> Tensor {
        let x = self.layer_norm.forward(&self.dense.forward(hidden).gelu("none"));
        x.linear(&embeddings.word_embeddings, Some(&self.bias))
    }
}
