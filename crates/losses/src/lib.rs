//! The losses of both stages: functions of tensors, fp32, without a host sync.
//!
//! Call them outside autocast: their products and softmaxes are meant in fp32. `B` is the local batch, `N` the global one, `E` the width
//! of the contrastive embeddings, `M` the number of labelled tokens, `V` the vocabulary.

pub mod itc;
pub mod itg;
pub mod itm;
pub mod lm;
mod smoothing;

pub use smoothing::smoothed_floor;
