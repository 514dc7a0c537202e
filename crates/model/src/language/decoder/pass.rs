//! What all layers of one forward pass share: rotations, masks and dropout.

use tch::{Device, Kind, Tensor};

use super::config::{DecoderConfig, LayerConfig};
use super::positions::{Rotary, Rotation};
use crate::dropout::{Dropout, RowKeys};

/// Rows of the language model have dropout keys of their own, apart from the Q-Former's segments.
const LANGUAGE_SEGMENT: i64 = 32;

/// One forward pass.
pub(super) struct Pass<'a> {
    rotations: Vec<Rotation>,
    masks: Masks,
    pub(super) dropout: &'a Dropout,
    /// One key a sample.
    pub(super) keys: RowKeys,
}

/// Who may attend to whom, for each window among the layers, as booleans that broadcast to `[B, 1, L, cached + L]`.
///
/// `None` is the causal mask without any window, which attention knows by itself. With a window of 2:
/// ```text
///          keys  0 1 2 3
/// query 0        x . . .
///       1        x x . .
///       2        . x x .
///       3        . . x x
/// ```
struct Masks(Vec<(Option<i64>, Option<Tensor>)>);

impl<'a> Pass<'a> {
    /// A pass over whole right-padded sequences at `positions i64 [1, L]`. A padded row is never seen by a token, which stands before it.
    pub(super) fn whole(
        config: &DecoderConfig,
        rotary: &[Rotary],
        positions: &Tensor,
        kind: Kind,
        dropout: &'a Dropout,
        batch: i64,
    ) -> Pass<'a> {
        let (rows, device) = (positions.size()[1], positions.device());
        // Keyed dropout and capped scores take a mask as a tensor.
        let explicit = dropout.drops_attention() || config.attention.logit_cap.is_some();
        let masks = Masks::of(config, rows, |window| {
            (explicit || window.is_some()).then(|| causal(rows, rows, window, device))
        });
        let rotations = rotary.iter().map(|rotary| rotary.at(positions, rows, kind)).collect();
        Pass { rotations, masks, dropout, keys: dropout.sample_keys(LANGUAGE_SEGMENT, 0, batch) }
    }

    /// A pass over the last rows of left-padded sequences, at `positions i64 [B, L]`; `mask bool [B, cached + L]` is true at tokens.
    pub(super) fn behind_cache(
        config: &DecoderConfig,
        rotary: &[Rotary],
        positions: &Tensor,
        kind: Kind,
        mask: &Tensor,
        dropout: &'a Dropout,
    ) -> Pass<'a> {
        let (rows, total, device) = (positions.size()[1], mask.size()[1], mask.device());
        // Rows of padding attend to themselves, so that no row of the softmax is empty.
        let own = Tensor::eye_m(rows, total, (Kind::Float, device)).roll([total - rows], [1]).to_kind(Kind::Bool);
        let masks = Masks::of(config, total, |window| {
            let tokens = mask.unsqueeze(1).unsqueeze(1); // [B, 1, 1, total]
            Some(tokens.logical_and(&causal(rows, total, window, device)).logical_or(&own))
        });
        let rotations = rotary.iter().map(|rotary| rotary.at(positions, total, kind)).collect();
        Pass { rotations, masks, dropout, keys: dropout.sample_keys(LANGUAGE_SEGMENT, 0, mask.size()[0]) }
    }

    /// The rotation of a layer's queries and keys.
    pub(super) fn rotation(&self, layer: &LayerConfig) -> Option<&Rotation> {
        layer.rotary.map(|table| &self.rotations[table])
    }

    /// The mask of a layer.
    pub(super) fn mask(&self, layer: &LayerConfig) -> Option<&Tensor> {
        self.masks.0.iter().find(|(window, _)| *window == layer.window).and_then(|(_, mask)| mask.as_ref())
    }
}

impl Masks {
    /// A window that holds all `total` keys is none.
    fn of(config: &DecoderConfig, total: i64, mask: impl Fn(Option<i64>) -> Option<Tensor>) -> Masks {
        let mut masks: Vec<(Option<i64>, Option<Tensor>)> = Vec::new();
        for layer in &config.layers {
            if masks.iter().all(|(window, _)| *window != layer.window) {
                masks.push((layer.window, mask(layer.window.filter(|&window| window < total))));
            }
        }
        Masks(masks)
    }
}

/// Each of the last `rows` of `total` rows sees itself and those before it, `window` together: `[rows, total]`.
fn causal(rows: i64, total: i64, window: Option<i64>, device: Device) -> Tensor {
    let past = Tensor::ones([rows, total], (Kind::Bool, device)).tril(total - rows);
    match window {
        Some(window) => past.logical_and(&Tensor::ones_like(&past).triu(total - rows - window + 1)),
        None => past,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(mask: &Tensor) -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(mask.to_kind(Kind::Int64)).unwrap()
    }

    #[test]
    fn a_window_counts_the_row_itself() {
        let mask = rows(&causal(4, 4, Some(2), Device::Cpu));
        assert_eq!(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]);
        assert_eq!(rows(&causal(2, 4, Some(3), Device::Cpu)), [[1, 1, 1, 0], [0, 1, 1, 1]]);
        assert_eq!(rows(&causal(2, 4, None, Device::Cpu)), [[1, 1, 1, 0], [1, 1, 1, 1]]);
    }
}
