//! Cross-attention keys and values, which depend on the image alone: projected once, used by every pass.

use tch::Tensor;

use super::layer::Layer;
use crate::layers::{LayerNorm, split_heads};

/// Keys and values of a batch of images, per layer with cross-attention.
#[derive(Debug)]
pub struct ImageKeys {
    layers: Vec<(Tensor, Tensor)>,
    batch: i64,
}

/// The images of P pairs in one layer: consecutive groups of pairs.
#[derive(Debug)]
pub struct PairKeysLayer {
    pub(super) groups: Vec<Group>,
}

/// `repeats * images` consecutive pairs; pair `r * images + i` has image `i`.
#[derive(Debug)]
pub(super) struct Group {
    /// `[images, heads, N, size]`
    pub key: Tensor,
    /// `[images, heads, N, size]`
    pub value: Tensor,
    pub images: i64,
    pub repeats: i64,
    /// The pair it begins with.
    pub first_pair: i64,
}

/// The images of P pairs, per layer with cross-attention.
#[derive(Debug)]
pub struct PairKeys {
    layers: Vec<PairKeysLayer>,
}

impl ImageKeys {
    /// `keys = W (xhat * g + b) + c = (W * g) xhat + (W b + c)`, with `xhat` the features normalised without affine part.
    ///
    /// Folding ln_vision's affine part into the weights leaves the largest products of the step without a gradient towards their input:
    /// `xhat` is constant because the tower is frozen. One product serves all layers.
    ///
    /// # Shapes
    /// `features [B, N, width]`; each key and value `[B, heads, N, size]`.
    pub(super) fn project(features: &Tensor, ln_vision: &LayerNorm, layers: &[Layer], heads: i64) -> ImageKeys {
        let cross: Vec<_> = layers.iter().filter_map(Layer::cross_projections).collect();
        let none: Option<&Tensor> = None;
        let normal =
            features.to_kind(tch::Kind::Float).layer_norm(ln_vision.weight.size(), none, none, ln_vision.eps, true);
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for linear in cross.iter().flat_map(|p| [&p.key, &p.value]) {
            weights.push(&linear.weight);
            biases.push(linear.bias.as_ref().expect("the Q-Former's projections have biases"));
        }
        let weight = Tensor::cat(&weights, 0); // [2 * layers * hidden, width]
        let bias = Tensor::cat(&biases, 0) + weight.mv(&ln_vision.bias);
        let projected = normal.linear(&(&weight * &ln_vision.weight), Some(&bias));
        let mut parts =
            projected.chunk(weights.len() as i64, -1).into_iter().map(|part| split_heads(&part, heads).contiguous());
        let mut layers = Vec::new();
        while let (Some(key), Some(value)) = (parts.next(), parts.next()) {
            layers.push((key, value));
        }
        ImageKeys { layers, batch: features.size()[0] }
    }

    /// Images.
    pub fn batch(&self) -> i64 {
        self.batch
    }

    /// Each image once: pair i has image i.
    pub fn as_pairs(&self) -> PairKeys {
        self.pairs(1, None)
    }

    /// Each image as many times: pair `r * images + i` has image i. Nothing is copied.
    pub fn repeated(&self, times: i64) -> PairKeys {
        self.pairs(times, None)
    }

    /// The three kinds of ITM pairs, in the order (positive, negative text, negative image): the first two share their images.
    ///
    /// `negatives`: for each row the image that replaces its own.
    pub fn matching_pairs(&self, negatives: &ImageKeys) -> PairKeys {
        self.pairs(2, Some(negatives))
    }

    /// Keys of chosen images, one pair each.
    pub fn select(&self, images: &Tensor) -> ImageKeys {
        // index_select, not advanced indexing: its backward sums repeated rows in a fixed order.
        let pick = |t: &Tensor| t.index_select(0, images);
        let layers = self.layers.iter().map(|(k, v)| (pick(k), pick(v))).collect();
        ImageKeys { layers, batch: images.size()[0] }
    }

    fn pairs(&self, repeats: i64, further: Option<&ImageKeys>) -> PairKeys {
        let group = |keys: &ImageKeys, layer: usize, repeats: i64, first_pair: i64| {
            let (key, value) = &keys.layers[layer];
            let (key, value) = (key.shallow_clone(), value.shallow_clone());
            Group { key, value, images: keys.batch, repeats, first_pair }
        };
        let layer = |layer: usize| {
            let first = group(self, layer, repeats, 0);
            let second = further.map(|keys| group(keys, layer, 1, repeats * self.batch));
            PairKeysLayer { groups: std::iter::once(first).chain(second).collect() }
        };
        PairKeys { layers: (0..self.layers.len()).map(layer).collect() }
    }
}

impl PairKeys {
    /// No images: text alone.
    pub fn none() -> PairKeys {
        PairKeys { layers: Vec::new() }
    }

    /// Keys of the i-th layer with cross-attention; `None` for text alone.
    pub(super) fn layer(&self, i: usize) -> Option<&PairKeysLayer> {
        self.layers.get(i)
    }
}

impl Group {
    /// How many pairs it covers.
    pub fn pairs(&self) -> i64 {
        self.repeats * self.images
    }
}
