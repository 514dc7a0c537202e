//! The language-modelling loss of stage 2 (BLIP-2, section 3.3): cross-entropy through the frozen language model, without smoothing.
//!
//! ```text
//! rows    .. q31    a    red    apple        (the last query predicts the first token)
//! labels     a      red  apple  EOS
//! ```

use tch::Tensor;

/// The mean loss over the labelled rows, 0-d; without rows it is NaN, so skip a batch that labels none.
///
/// # Shapes
/// `logits [M, V]` of any dtype, `labels i64 [M]`.
pub fn loss(logits: &Tensor, labels: &Tensor) -> Tensor {
    crate::itg::loss(logits, labels, 0.0)
}

/// The loss of equal logits over a vocabulary.
pub fn chance(vocabulary: usize) -> f64 {
    (vocabulary as f64).ln()
}
