//! Image-text matching with hard negatives (BLIP-2, section 3.2; ALBEF).
//!
//! For each text a negative image is drawn from the softmax of `s_t2i`, for each image a negative text from that of `s_i2t`; the own column and
//! other samples of the same image have weight zero.
//!
//! ```text
//! pairs  [ (image, text) x B | (negative image, text) x B | (image, negative text) x B ]     labels [ 1 | 0 | 0 ]
//! L = CE(logits [3B, 2], labels), no smoothing
//! ```

use tch::{Kind, Reduction, Tensor};

/// The loss of predicting the prior of one positive in three: "stuck at 0.63" is this.
pub const PRIOR: f64 = 0.636_514_168_294_813;

/// Draws a negative column for every row, on the device and without a host sync.
///
/// Inverse CDF: the first column whose cumulative weight exceeds `uniform * total`.
///
/// # Shapes
/// `similarity [B, N]` (after temperature), `excluded bool [B, N]` (own column and same image), `uniform f32 [B]` in [0, 1) `-> i64 [B]`.
///
/// `weight_floor` is added to every weight (LAVIS before July 2023: 1e-4; now 0).
///
/// # Differs from the reference
/// LAVIS draws by `multinomial`, row by row; the distribution is the same, the random stream is not. A row whose every other column shows
/// its own image takes any column but its own.
pub fn sample_negatives(
    similarity: &Tensor,
    excluded: &Tensor,
    targets: &Tensor,
    uniform: &Tensor,
    weight_floor: f64,
) -> Tensor {
    tch::no_grad(|| {
        let columns = Tensor::arange(similarity.size()[1], (Kind::Int64, similarity.device()));
        let own = targets.unsqueeze(1).eq_tensor(&columns.unsqueeze(0));
        let excluded = excluded.logical_or(&own);
        let hopeless = excluded.all_dim(1, true);
        let excluded = excluded.logical_and(&hopeless.logical_not()).logical_or(&own);
        let weights =
            similarity.detach().to_kind(Kind::Float).masked_fill(&excluded, f64::NEG_INFINITY).softmax(-1, Kind::Float);
        let weights = (weights + weight_floor).masked_fill(&excluded, 0.0);
        let cumulative = weights.cumsum(-1, Kind::Float);
        let total = cumulative.narrow(1, cumulative.size()[1] - 1, 1);
        let wanted = uniform.unsqueeze(1) * total;
        let drawn = wanted.searchsorted(&cumulative, false, true, "right", None::<&Tensor>).squeeze_dim(1);
        // Rounding may carry the draw past the last column that has a weight.
        let last = (weights.gt(0.0).to_kind(Kind::Int64) * columns).amax([1i64].as_slice(), false);
        drawn.minimum(&last)
    })
}

/// The mean loss over the 3B pairs, 0-d.
///
/// # Shapes
/// `logits f32 [3B, 2]`: positives first.
pub fn loss(logits: &Tensor) -> Tensor {
    logits.cross_entropy_loss::<Tensor>(&labels(logits), None, Reduction::Mean, -100, 0.0)
}

/// The share of pairs told apart, 0-d.
pub fn accuracy(logits: &Tensor) -> Tensor {
    logits.argmax(-1, false).eq_tensor(&labels(logits)).to_kind(Kind::Float).mean(Kind::Float)
}

fn labels(logits: &Tensor) -> Tensor {
    let pairs = logits.size()[0];
    Tensor::arange(pairs, (Kind::Int64, logits.device())).lt(pairs / 3).to_kind(Kind::Int64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn ints(t: &Tensor) -> Vec<i64> {
        Vec::<i64>::try_from(t).unwrap()
    }

    fn none(rows: i64, columns: i64) -> Tensor {
        Tensor::zeros([rows, columns], (Kind::Bool, Device::Cpu))
    }

    #[test]
    fn the_prior_is_one_in_three() {
        let logits = Tensor::from_slice(&[2f32.ln(), 0.0]).repeat([3, 1]);
        assert!((loss(&logits).double_value(&[]) - PRIOR).abs() < 1e-6);
    }

    #[test]
    fn draws_follow_the_softmax_without_the_own_column() {
        let rows = 20_000;
        let similarity = Tensor::from_slice(&[1f32, 0., 2., 3.]).repeat([rows, 1]);
        let targets = Tensor::zeros([rows], (Kind::Int64, Device::Cpu));
        let uniform = (Tensor::arange(rows, (Kind::Float, Device::Cpu)) + 0.5) / rows as f64;
        let drawn = sample_negatives(&similarity, &none(rows, 4), &targets, &uniform, 0.0);
        let expected = Tensor::from_slice(&[f32::NEG_INFINITY, 0., 2., 3.]).softmax(-1, Kind::Float);
        for column in 0..4 {
            let share = drawn.eq(column).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!((share - expected.double_value(&[column])).abs() < 1e-3, "column {column}: {share}");
        }
    }

    #[test]
    fn no_draw_is_the_own_column_or_the_same_image() {
        tch::manual_seed(0);
        let (n, draws) = (6, 400);
        let ids = Tensor::from_slice(&[1i64, 2, 1, 3, 4, 1]);
        let targets = Tensor::arange(n, (Kind::Int64, Device::Cpu));
        let same = crate::itc::same_image_columns(&ids, &ids, &targets);
        for _ in 0..draws {
            let similarity = Tensor::randn([n, n], (Kind::Float, Device::Cpu)) * 50.0;
            let uniform = Tensor::rand([n], (Kind::Float, Device::Cpu));
            let drawn = sample_negatives(&similarity, &same, &targets, &uniform, 0.0);
            let (drawn, ids) = (ints(&drawn), ints(&ids));
            for (row, &column) in drawn.iter().enumerate() {
                assert_ne!(ids[row], ids[column as usize]);
            }
        }
    }

    #[test]
    fn rounding_at_the_end_stays_on_a_column_with_weight() {
        let similarity = Tensor::from_slice(&[0f32, 0., -1e30, -1e30]).view([1, 4]);
        let targets = Tensor::from_slice(&[0i64]);
        let uniform = Tensor::from_slice(&[0.999_999_94f32]);
        assert_eq!(ints(&sample_negatives(&similarity, &none(1, 4), &targets, &uniform, 0.0)), [1]);
    }

    #[test]
    fn a_batch_of_one_image_still_draws_another_row() {
        let ids = Tensor::from_slice(&[5i64, 5]);
        let targets = Tensor::from_slice(&[0i64, 1]);
        let same = crate::itc::same_image_columns(&ids, &ids, &targets);
        let drawn = sample_negatives(
            &Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)),
            &same,
            &targets,
            &Tensor::from_slice(&[0f32, 0.5]),
            0.0,
        );
        assert_eq!(ints(&drawn), [1, 0]);
    }

    #[test]
    fn the_floor_gives_every_other_column_a_chance() {
        let similarity = Tensor::from_slice(&[0f32, 1000., 0., 0.]).view([1, 4]);
        let targets = Tensor::from_slice(&[0i64]);
        let draw =
            |u: f32| ints(&sample_negatives(&similarity, &none(1, 4), &targets, &Tensor::from_slice(&[u]), 0.25))[0];
        assert_eq!([draw(0.0), draw(0.7), draw(0.75), draw(0.9)], [1, 1, 2, 3]);
    }
}
