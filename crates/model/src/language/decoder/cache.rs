//! Keys and values of the tokens so far.

use tch::Tensor;

/// Keys and values of the tokens so far, per layer `[B, key-value heads, L, size]`.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// Appends the rows of a layer and returns all of its keys and values.
    pub(super) fn extend(&mut self, layer: usize, k: Tensor, v: Tensor) -> (Tensor, Tensor) {
        let (k, v) = match self.layers.get(layer) {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 2), Tensor::cat(&[old_v, &v], 2)),
            None => (k, v),
        };
        let kept = (k.shallow_clone(), v.shallow_clone());
        if layer < self.layers.len() {
            self.layers[layer] = kept
        } else {
            self.layers.push(kept)
        }
        (k, v)
    }

    /// Reorders (or repeats) the sequences, as beam search does.
    pub fn select(&mut self, rows: &Tensor) {
        for (k, v) in &mut self.layers {
            *k = k.index_select(0, rows);
            *v = v.index_select(0, rows);
        }
    }
}
