//! Dropout whose masks are a function of the seed, the sample and the place in the network.
//!
//! A mask drawn from one global generator depends on everything drawn before it: on the batch a sample sits in, on ranks, on restarts.
//! Here each element's decision is keyed by (seed, stream position of the sample, site), so a resumed run needs no generator state and
//! the same sample gets the same mask in any batch.

use std::cell::Cell;

use blip2_torchx::dropout::{DropoutKey, attention, dropout, dropout_add_layer_norm};
use blip2_torchx::rng::finalise;
use tch::{Kind, Tensor};

use crate::layers::{LayerNorm, attend};

/// Row keys leave room for 2^20 rows (segment and token) below each stream position.
const ROWS_PER_SAMPLE: i64 = 1 << 20;
/// Segments of a sample (queries, text, the pair's kind) are this many rows apart.
const ROWS_PER_SEGMENT: i64 = 1 << 14;
/// The kinds of ITM pairs of one sample are this many stream positions apart: more samples than a run sees.
const POSITIONS_PER_PAIR_KIND: i64 = 1 << 41;
/// Sites of the pairs' pass begin here, behind those of the packed pass.
const FIRST_PAIR_SITE: u64 = 1 << 20;
/// Sites of the frozen language model begin here.
const FIRST_LANGUAGE_SITE: u64 = 1 << 21;

/// Probabilities of dropout by place.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DropoutRates {
    /// Of what enters the first layer.
    pub embedding: f64,
    /// Of attention's probabilities.
    pub attention: f64,
    /// Of what a sub-layer adds to the residual stream.
    pub residual: f64,
}

impl DropoutRates {
    /// The same probability everywhere.
    pub fn all(p: f64) -> DropoutRates {
        DropoutRates { embedding: p, attention: p, residual: p }
    }
}

/// The dropout of one forward pass: off, or keyed.
#[derive(Debug)]
pub struct Dropout(Option<Keyed>);

#[derive(Debug)]
struct Keyed {
    rates: DropoutRates,
    seed: u64,
    positions: Tensor,
    site: Cell<u64>,
}

/// Keys of the rows of one pass, made once and used at every site of it.
#[derive(Debug)]
pub struct RowKeys(Option<Tensor>);

impl Dropout {
    /// No dropout: evaluation, or parity with a reference.
    pub fn off() -> Dropout {
        Dropout(None)
    }

    /// Dropout with probability `p` for the samples at these stream positions (`i64 [B]`, on the device).
    pub fn keyed(p: f64, seed: u64, positions: Tensor) -> Dropout {
        Dropout::starting_at(0, DropoutRates::all(p), seed, positions)
    }

    /// Dropout inside a frozen language model: sites of its own, and a probability for each kind of place.
    pub fn keyed_in_language_model(rates: DropoutRates, seed: u64, positions: Tensor) -> Dropout {
        Dropout::starting_at(FIRST_LANGUAGE_SITE, rates, seed, positions)
    }

    fn starting_at(site: u64, rates: DropoutRates, seed: u64, positions: Tensor) -> Dropout {
        let on = rates != DropoutRates::default();
        Dropout(on.then(|| Keyed { rates, seed, positions, site: Cell::new(site) }))
    }

    /// Whether [`Dropout::attend`] drops anything.
    pub(crate) fn drops_attention(&self) -> bool {
        self.0.as_ref().is_some_and(|keyed| keyed.rates.attention > 0.0)
    }

    /// Whether nothing is dropped.
    pub(crate) fn is_off(&self) -> bool {
        self.0.is_none()
    }

    /// The dropout of the three kinds of ITM pairs made from this batch, in their order: the same stream positions, other keys.
    pub(crate) fn for_pairs(&self) -> Dropout {
        Dropout(self.0.as_ref().map(|keyed| {
            let kinds: Vec<Tensor> = (0..3).map(|kind| &keyed.positions + kind * POSITIONS_PER_PAIR_KIND).collect();
            Keyed { positions: Tensor::cat(&kinds, 0), site: Cell::new(FIRST_PAIR_SITE), ..*keyed }
        }))
    }

    /// Keys of `rows` consecutive token rows of every sample, sample by sample: `[B * rows]`.
    pub(crate) fn token_keys(&self, segment: i64, rows: i64) -> RowKeys {
        RowKeys(self.0.as_ref().map(|keyed| {
            let first = segment * ROWS_PER_SEGMENT;
            let tokens = Tensor::arange_start(first, first + rows, (Kind::Int64, keyed.positions.device()));
            (keyed.positions.unsqueeze(1) * ROWS_PER_SAMPLE + tokens).flatten(0, 1)
        }))
    }

    /// Keys of `count` samples from `first` on in a segment: `[count]`, for attention maps.
    pub(crate) fn sample_keys(&self, segment: i64, first: i64, count: i64) -> RowKeys {
        let offset = segment * ROWS_PER_SEGMENT;
        RowKeys(self.0.as_ref().map(|k| k.positions.narrow(0, first, count) * ROWS_PER_SAMPLE + offset))
    }

    /// `dropout(x)`; `keys` has one entry a row of `x [R, ..]`.
    pub fn apply(&self, x: &Tensor, keys: &RowKeys) -> Tensor {
        self.dropped(x, keys, |rates| rates.residual)
    }

    /// [`Dropout::apply`] at the rate of embeddings.
    pub(crate) fn apply_embedding(&self, x: &Tensor, keys: &RowKeys) -> Tensor {
        self.dropped(x, keys, |rates| rates.embedding)
    }

    /// [`Dropout::apply`] at the rate of attention, for probabilities `[B, H, N, M]` that were computed outside [`Dropout::attend`].
    pub(crate) fn apply_attention(&self, x: &Tensor, keys: &RowKeys) -> Tensor {
        self.dropped(x, keys, |rates| rates.attention)
    }

    fn dropped(&self, x: &Tensor, keys: &RowKeys, rate: impl Fn(&DropoutRates) -> f64) -> Tensor {
        match self.next(keys, rate) {
            Some((p, key)) => dropout(x, p, key),
            None => x.shallow_clone(),
        }
    }

    /// `dropout(x)` of token rows `x [B, rows, ..]`; `keys` are those of [`Dropout::token_keys`].
    pub(crate) fn apply_tokens(&self, x: &Tensor, keys: &RowKeys) -> Tensor {
        match self.next(keys, |rates| rates.residual) {
            Some((p, key)) => dropout(&x.flatten(0, 1).contiguous(), p, key).view_as(x),
            None => x.shallow_clone(),
        }
    }

    /// `LayerNorm(dropout(x) + residual)`, the end of every BERT sub-layer.
    pub(crate) fn add_norm(&self, x: &Tensor, residual: &Tensor, norm: &LayerNorm, keys: &RowKeys) -> Tensor {
        let (p, key) = self.next(keys, |rates| rates.residual).map_or((0.0, None), |(p, key)| (p, Some(key)));
        dropout_add_layer_norm(x, residual, &norm.weight, &norm.bias, norm.eps, p, key)
    }

    /// Attention with dropout on its probabilities.
    ///
    /// # Shapes
    /// As [`attend`]; `keys` has one entry a sample `[B]`.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, keys: &RowKeys) -> Tensor {
        match self.next(keys, |rates| rates.attention) {
            Some((p, key)) => attention(q, k, v, mask, p, Some(key)),
            None => attend(q, k, v, mask),
        }
    }

    /// The next site's key, where its rate is above 0. Sites are numbered in the order of the forward pass, which is the same for every
    /// batch.
    fn next<'a>(&self, keys: &'a RowKeys, rate: impl Fn(&DropoutRates) -> f64) -> Option<(f64, DropoutKey<'a>)> {
        let keyed = self.0.as_ref()?;
        let p = rate(&keyed.rates);
        if p == 0.0 {
            return None;
        }
        let rows = keys.0.as_ref()?;
        let site = keyed.site.get();
        keyed.site.set(site + 1);
        Some((p, DropoutKey { site: mix(keyed.seed, site), rows }))
    }
}

impl RowKeys {
    /// Keys of the rows of several segments, one after the other.
    pub fn concat(parts: &[&RowKeys]) -> RowKeys {
        let tensors: Option<Vec<&Tensor>> = parts.iter().map(|p| p.0.as_ref()).collect();
        RowKeys(tensors.map(|t| Tensor::cat(&t, 0)))
    }
}

/// Mixes a seed and a site number into one key (splitmix64's finaliser over their sum).
fn mix(seed: u64, site: u64) -> u64 {
    finalise(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(site.wrapping_mul(0xD1B5_4A32_D192_ED03)))
}
