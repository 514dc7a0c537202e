//! Texts that are being written: a language model with what it remembers, a token of each text at a time.

use tch::{Kind, Tensor};

use super::t5::DecoderState;
use super::{Decoder, KvCache, LanguageModel, Prompt, T5};

/// A batch of running texts, whatever kind of model writes them.
///
/// A decoder reads the prefixes with padding in front, so that every text goes on at the same row; an encoder-decoder encodes them once, with
/// padding behind, and its decoder starts from nothing.
pub struct Session<'a> {
    writer: Writer<'a>,
}

enum Writer<'a> {
    /// `mask bool [B, rows]`, true at tokens.
    Decoder {
        model: &'a Decoder,
        cache: KvCache,
        mask: Tensor,
    },
    EncoderDecoder {
        model: &'a T5,
        state: DecoderState,
    },
}

impl Session<'_> {
    /// Reads the prefixes and predicts the first token behind each: f32 logits `[B, vocabulary]`.
    pub fn begin<'a>(model: &'a LanguageModel, prefixes: &[Prompt]) -> (Session<'a>, Tensor) {
        let (writer, logits) = match model {
            LanguageModel::Decoder(model) => {
                let Padded { embeds, mask } = Padded::new(prefixes, Side::Front);
                let mut cache = KvCache::default();
                let logits = next_logits(model, &embeds, &mask, &mut cache);
                (Writer::Decoder { model, cache, mask }, logits)
            }
            LanguageModel::T5(model) => {
                let Padded { embeds, mask } = Padded::new(prefixes, Side::Behind);
                let (state, logits) = model.begin(&embeds, &mask);
                (Writer::EncoderDecoder { model, state }, logits)
            }
        };
        (Session { writer }, logits.to_kind(Kind::Float))
    }

    /// Appends a token to each text and predicts the next: f32 logits `[B, vocabulary]`.
    pub fn step(&mut self, tokens: &[i64]) -> Tensor {
        let tokens = Tensor::from_slice(tokens);
        let logits = match &mut self.writer {
            Writer::Decoder { model, cache, mask } => {
                let one = Tensor::ones([mask.size()[0], 1], (Kind::Bool, mask.device()));
                *mask = Tensor::cat(&[&*mask, &one], 1);
                let embeds = model.embed(&tokens.to_device(mask.device()).unsqueeze(1));
                next_logits(model, &embeds, mask, cache)
            }
            Writer::EncoderDecoder { model, state } => {
                let device = state.device();
                model.step(&tokens.to_device(device), state)
            }
        };
        logits.to_kind(Kind::Float)
    }

    /// Makes `times` texts of each, side by side.
    pub fn widen(&mut self, times: i64) {
        match &mut self.writer {
            Writer::Decoder { cache, mask, .. } => {
                let rows = Tensor::arange(mask.size()[0], (Kind::Int64, mask.device()));
                cache.select(&rows.repeat_interleave_self_int(times, 0, None));
                *mask = mask.repeat_interleave_self_int(times, 0, None);
            }
            Writer::EncoderDecoder { state, .. } => state.widen(times),
        }
    }

    /// Lets each text go on from its parent, a text behind the same prefix: beam search's choice.
    pub fn select(&mut self, parents: &[i64]) {
        let parents = Tensor::from_slice(parents);
        match &mut self.writer {
            Writer::Decoder { cache, mask, .. } => cache.select(&parents.to_device(mask.device())),
            Writer::EncoderDecoder { state, .. } => {
                let device = state.device();
                state.select(&parents.to_device(device));
            }
        }
    }
}

/// Logits of the last row, `[B, vocabulary]`.
fn next_logits(model: &Decoder, embeds: &Tensor, mask: &Tensor, cache: &mut KvCache) -> Tensor {
    let hidden = model.forward_cached(embeds, mask, cache);
    model.logits(&hidden.select(1, hidden.size()[1] - 1))
}

/// Where the padding is.
#[derive(Clone, Copy)]
enum Side {
    Front,
    Behind,
}

/// Prefixes of different lengths as a rectangle: `embeds [B, rows, hidden]`, `mask bool [B, rows]`.
struct Padded {
    embeds: Tensor,
    mask: Tensor,
}

impl Padded {
    fn new(prefixes: &[Prompt], side: Side) -> Padded {
        let longest = prefixes.iter().map(|prefix| prefix.size()[0]).max().unwrap_or(0);
        let around = |prefix: &Tensor| match (longest - prefix.size()[0], side) {
            (missing, Side::Front) => (missing, 0),
            (missing, Side::Behind) => (0, missing),
        };
        let embeds = prefixes.iter().map(|prefix| {
            let (front, behind) = around(prefix);
            prefix.constant_pad_nd([0, 0, front, behind])
        });
        let mask = prefixes.iter().map(|prefix| {
            let (front, behind) = around(prefix);
            Tensor::ones([prefix.size()[0]], (Kind::Float, prefix.device())).constant_pad_nd([front, behind])
        });
        Padded {
            embeds: Tensor::stack(&embeds.collect::<Vec<_>>(), 0),
            mask: Tensor::stack(&mask.collect::<Vec<_>>(), 0).to_kind(Kind::Bool),
        }
    }
}
