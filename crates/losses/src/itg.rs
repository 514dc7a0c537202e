//! Image-grounded text generation (BLIP-2, section 3.2).
//!
//! The text begins with `[DEC]` instead of `[CLS]`; each row predicts the next token, `[SEP]` included; padding is no target.
//!
//! ```text
//! rows    [DEC]  a   red  apple
//! labels  a      red apple [SEP]
//! L = CE(logits [M, V], labels [M]) with label smoothing, mean over the M labelled rows
//! ```
//!
//! # Differs from the reference
//! The mean is over the tokens of the global batch, which the caller weighs in; LAVIS averages each rank's own mean.

use tch::{Kind, Reduction, Tensor};

/// The mean loss over the labelled rows, 0-d; without rows it is NaN, so skip a batch that labels none.
///
/// # Shapes
/// `logits [M, V]` of any dtype, `labels i64 [M]`.
pub fn loss(logits: &Tensor, labels: &Tensor, label_smoothing: f64) -> Tensor {
    logits.to_kind(Kind::Float).cross_entropy_loss::<Tensor>(labels, None, Reduction::Mean, -100, label_smoothing)
}

/// The share of labelled tokens that the logits rank first, 0-d.
pub fn accuracy(logits: &Tensor, labels: &Tensor) -> Tensor {
    logits.argmax(-1, false).eq_tensor(labels).to_kind(Kind::Float).mean(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perfect_prediction_reaches_the_smoothed_floor() {
        let classes = 50i64;
        let own = 0.9 + 0.1 / classes as f64;
        let mut p = vec![0.1 / classes as f64; classes as usize];
        p[7] = own;
        let logits = Tensor::from_slice(&p).log().to_kind(Kind::Float).unsqueeze(0);
        let labels = Tensor::from_slice(&[7i64]);
        let expected = crate::smoothed_floor(classes as f64, 0.1);
        assert!((loss(&logits, &labels, 0.1).double_value(&[]) - expected).abs() < 1e-5);
        assert_eq!(accuracy(&logits, &labels).double_value(&[]), 1.0);
    }
}
