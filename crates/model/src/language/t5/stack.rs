//! The encoder and the decoder: blocks between an embedding and a last norm.

use blip2_torchx::params::Scope;
use tch::{Device, Kind, Tensor};

use super::T5Config;
use super::layers::{AttentionLayer, Drops, FeedForward, KeyValues, RmsNorm};
use super::position::RelativePositions;
use crate::dropout::Dropout;

/// Reads a text as a whole: every row attends to every token.
#[derive(Debug)]
pub(super) struct Encoder {
    positions: RelativePositions,
    blocks: Vec<EncoderBlock>,
    final_layer_norm: RmsNorm,
}

#[derive(Debug)]
struct EncoderBlock {
    attention: AttentionLayer,
    feed_forward: FeedForward,
}

/// Writes a text token by token: a row attends to itself, to the rows before it, and to what the encoder read.
#[derive(Debug)]
pub(super) struct Decoder {
    positions: RelativePositions,
    blocks: Vec<DecoderBlock>,
    final_layer_norm: RmsNorm,
}

#[derive(Debug)]
struct DecoderBlock {
    attention: AttentionLayer,
    cross_attention: AttentionLayer,
    feed_forward: FeedForward,
}

/// What a decoder remembers of the texts that it writes: keys and values of what was read, projected once, and of its own rows so far.
#[derive(Debug)]
pub struct DecoderState {
    read: Vec<KeyValues>,
    /// Added to the scores against what was read, `[B, 1, 1, N]`.
    read_bias: Tensor,
    own: Vec<KeyValues>,
    rows: i64,
}

impl Encoder {
    pub(super) fn new(scope: &Scope, c: &T5Config) -> Encoder {
        let blocks = (0..c.num_layers).map(|i| {
            let layer = scope.pp("block").pp(i).pp("layer");
            EncoderBlock {
                attention: AttentionLayer::new(&layer.pp(0), "SelfAttention", c),
                feed_forward: FeedForward::new(&layer.pp(1), c),
            }
        });
        Encoder {
            positions: RelativePositions::new(&first_attention(scope), c, true),
            blocks: blocks.collect(),
            final_layer_norm: RmsNorm::new(&scope.pp("final_layer_norm"), c),
        }
    }

    /// `embeds [B, N, d_model]`, `mask bool [B, N]`, true at tokens; `-> [B, N, d_model]`.
    pub(super) fn forward(&self, embeds: &Tensor, mask: &Tensor, dropout: &Dropout) -> Tensor {
        let rows = embeds.size()[1];
        let drops = Drops::new(dropout, rows);
        let bias = self.positions.bias(0, rows) + mask_bias(mask, embeds.kind());
        let mut x = drops.apply(embeds);
        for block in &self.blocks {
            let normed = block.attention.norm(&x);
            x = block.attention.attend(&x, &normed, &block.attention.key_values(&normed), &bias, &drops);
            x = block.feed_forward.forward(&x, &drops);
        }
        drops.apply(&self.final_layer_norm.forward(&x))
    }
}

impl Decoder {
    pub(super) fn new(scope: &Scope, c: &T5Config) -> Decoder {
        let blocks = (0..c.decoder_layers()).map(|i| {
            let layer = scope.pp("block").pp(i).pp("layer");
            DecoderBlock {
                attention: AttentionLayer::new(&layer.pp(0), "SelfAttention", c),
                cross_attention: AttentionLayer::new(&layer.pp(1), "EncDecAttention", c),
                feed_forward: FeedForward::new(&layer.pp(2), c),
            }
        });
        Decoder {
            positions: RelativePositions::new(&first_attention(scope), c, false),
            blocks: blocks.collect(),
            final_layer_norm: RmsNorm::new(&scope.pp("final_layer_norm"), c),
        }
    }

    /// Before the first token: `read [B, N, d_model]` from the encoder with its `mask bool [B, N]`.
    pub(super) fn begin(&self, read: &Tensor, mask: &Tensor) -> DecoderState {
        DecoderState {
            read: self.blocks.iter().map(|block| block.cross_attention.key_values(read)).collect(),
            read_bias: mask_bias(mask, read.kind()),
            own: Vec::new(),
            rows: 0,
        }
    }

    /// The rows behind those in `state`, which grows by them: `embeds [B, T, d_model] -> [B, T, d_model]`.
    pub(super) fn forward(&self, embeds: &Tensor, state: &mut DecoderState, dropout: &Dropout) -> Tensor {
        let (rows, first) = (embeds.size()[1], state.rows);
        let total = first + rows;
        let drops = Drops::new(dropout, rows);
        let later = Tensor::ones([rows, total], (Kind::Bool, embeds.device())).triu(first + 1);
        let bias = self.positions.bias(first, total).masked_fill(&later, f64::NEG_INFINITY);
        let mut x = drops.apply(embeds);
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.attention.norm(&x);
            let own = state.extend(i, block.attention.key_values(&normed));
            x = block.attention.attend(&x, &normed, own, &bias, &drops);
            let normed = block.cross_attention.norm(&x);
            x = block.cross_attention.attend(&x, &normed, &state.read[i], &state.read_bias, &drops);
            x = block.feed_forward.forward(&x, &drops);
        }
        state.rows = total;
        drops.apply(&self.final_layer_norm.forward(&x))
    }
}

impl DecoderState {
    /// Appends a block's rows and returns all of them.
    fn extend(&mut self, block: usize, rows: KeyValues) -> &KeyValues {
        match self.own.get_mut(block) {
            Some(own) => *own = own.followed_by(&rows),
            None => self.own.push(rows),
        }
        &self.own[block]
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.read_bias.device()
    }

    /// Several texts for each of what was read, side by side: `times` of them.
    pub fn widen(&mut self, times: i64) {
        let rows = Tensor::arange(self.read_bias.size()[0], (Kind::Int64, self.read_bias.device()));
        let rows = rows.repeat_interleave_self_int(times, 0, None);
        self.read.iter_mut().for_each(|block| *block = block.select(&rows));
        self.read_bias = self.read_bias.index_select(0, &rows);
        self.select(&rows);
    }

    /// Goes on from these texts (`i64`, one entry a text); each must have read what the text in its place has.
    pub fn select(&mut self, rows: &Tensor) {
        self.own.iter_mut().for_each(|block| *block = block.select(rows));
    }
}

/// The one place of a stack that keeps the table of relative positions.
fn first_attention(scope: &Scope) -> Scope {
    scope.pp("block").pp(0).pp("layer").pp(0).pp("SelfAttention")
}

/// `mask bool [B, N]` as what is added to scores: `[B, 1, 1, N]`.
fn mask_bias(mask: &Tensor, kind: Kind) -> Tensor {
    let zeros = Tensor::zeros(mask.size(), (kind, mask.device()));
    zeros.masked_fill(&mask.logical_not(), f64::NEG_INFINITY).unsqueeze(1).unsqueeze(1)
}
