//! What a language model must offer to continue a picture's prefix, and the greedy choice of its words.

use anyhow::{Result, bail};
use candle_core::Tensor;

/// A language model that continues embedded rows.
pub trait LanguageModel {
    /// `ids -> [1, T, hidden]`
    fn embed(&self, ids: &[u32]) -> Result<Tensor>;

    /// Reads what stands in front of the text, `[1, L, hidden]`; returns the logits of the first new token, `[vocabulary]`.
    fn start(&self, prefix: &Tensor) -> Result<(State, Tensor)>;

    /// Adds one token to the text and returns the logits of the next.
    fn step(&self, state: &mut State, token: u32) -> Result<Tensor>;
}

/// What a model remembers of a text, so that each token is computed once.
#[derive(Default)]
pub struct State {
    /// Keys and values of the text's own rows, one entry a layer.
    pub layers: Vec<KvCache>,
    /// Keys and values of an encoder's rows, one entry a layer of the decoder.
    pub encoded: Vec<(Tensor, Tensor)>,
}

impl State {
    /// An empty text behind `layers` layers.
    pub fn new(layers: usize) -> State {
        State { layers: (0..layers).map(|_| KvCache::default()).collect(), encoded: Vec::new() }
    }

    /// Rows that it remembers.
    pub fn rows(&self) -> Result<usize> {
        match self.layers.first() {
            Some(KvCache(Some((keys, _)))) => Ok(keys.dim(2)?),
            _ => Ok(0),
        }
    }
}

/// Keys and values so far, each `[1, heads, L, size]`.
#[derive(Default)]
pub struct KvCache(Option<(Tensor, Tensor)>);

impl KvCache {
    /// Appends rows and returns all of them.
    pub fn extend(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = match self.0.take() {
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, &k], 2)?, Tensor::cat(&[&old_v, &v], 2)?),
            None => (k, v),
        };
        self.0 = Some((k.clone(), v.clone()));
        Ok((k, v))
    }
}

/// When a text may and must end.
pub struct Limits {
    /// At most so many new tokens.
    pub max_new_tokens: usize,
    /// No end token before so many.
    pub min_new_tokens: usize,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// The likeliest token at each step, cut before the end token.
pub fn greedy(model: &dyn LanguageModel, prefix: &Tensor, limits: &Limits) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let (mut state, mut logits) = model.start(prefix)?;
    while ids.len() < limits.max_new_tokens {
        let forbidden = if ids.len() < limits.min_new_tokens { limits.eos.as_slice() } else { &[] };
        let token = likeliest(&logits.to_vec1()?, forbidden)?;
        if limits.eos.contains(&token) {
            break;
        }
        ids.push(token);
        if ids.len() < limits.max_new_tokens {
            logits = model.step(&mut state, token)?;
        }
    }
    Ok(ids)
}

fn likeliest(logits: &[f32], forbidden: &[u32]) -> Result<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in (0..).zip(logits) {
        if !forbidden.contains(&id) && best.map_or(!logit.is_nan(), |(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    match best {
        Some((id, _)) => Ok(id),
        None => bail!("the language model's output is not a number; are its weights damaged?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_likeliest_is_taken_and_forbidden_ones_are_not() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0], &[]).unwrap(), 1);
        assert_eq!(likeliest(&[1.0, 3.0, 2.0], &[1]).unwrap(), 2);
        assert!(likeliest(&[f32::NAN; 2], &[]).is_err());
    }
}
