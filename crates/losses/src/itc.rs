//! Image-text contrast (BLIP-2, section 3.2; ALBEF).
//!
//! ```text
//! s_i2t[i, j] = max_m <q[i, m], t[j]> / temp        rows: own images, columns: all texts
//! s_t2i[i, j] = max_m <t[i], q[j, m]> / temp        rows: own texts, columns: all images
//! L = ( CE(s_i2t, y) + CE(s_t2i, y) ) / 2           label smoothing over the columns that stay
//! ```
//!
//! The maximum over queries comes before the division by `temp`. Columns are detached, the own slice included, so that `s_i2t` trains the image
//! side and `s_t2i` the text side, on any number of ranks.
//!
//! ```text
//! columns of row i:    own (target)    another image (negative)    the same image again (left out)
//! ```

use tch::{Kind, Tensor};

/// Similarities after the temperature.
#[derive(Debug)]
pub struct Similarities {
    /// `[B, N]`, images against all texts.
    pub i2t: Tensor,
    /// `[B, N]`, texts against all images.
    pub t2i: Tensor,
}

/// Similarities of the own rows against the columns of all ranks.
///
/// # Shapes
/// `image_embeds [B, queries, E]`, `text_embeds [B, E]`, L2-normalised; `all_images [N, queries, E]`, `all_texts [N, E]` the same of every
/// rank; `temp []`.
pub fn similarities(
    image_embeds: &Tensor,
    text_embeds: &Tensor,
    all_images: &Tensor,
    all_texts: &Tensor,
    temp: &Tensor,
) -> Similarities {
    Similarities {
        i2t: best_query(image_embeds, &all_texts.detach()) / temp,
        t2i: best_query(&all_images.detach(), text_embeds).transpose(0, 1) / temp,
    }
}

/// `max_m <images[i, m], texts[j]>`: `[A, queries, E] x [C, E] -> [A, C]`.
pub fn best_query(images: &Tensor, texts: &Tensor) -> Tensor {
    let (rows, queries, width) = images.size3().expect("rank 3: [A, queries, E]");
    let products = images.reshape([rows * queries, width]).matmul(&texts.transpose(0, 1));
    products.view([rows, queries, -1]).max_dim(1, false).0
}

/// Columns that show a row's own image in another sample: neither targets nor negatives.
///
/// # Shapes
/// `ids i64 [B]`, `all_ids i64 [N]`, `targets i64 [B]` (each row's own column) `-> bool [B, N]`.
pub fn same_image_columns(ids: &Tensor, all_ids: &Tensor, targets: &Tensor) -> Tensor {
    let columns = Tensor::arange(all_ids.size()[0], (Kind::Int64, ids.device()));
    let own = targets.unsqueeze(1).eq_tensor(&columns.unsqueeze(0));
    ids.unsqueeze(1).eq_tensor(&all_ids.unsqueeze(0)).logical_and(&own.logical_not())
}

/// The mean loss of the own rows, 0-d.
///
/// # Shapes
/// `targets i64 [B]`, `same_image bool [B, N]` from [`same_image_columns`].
pub fn loss(s: &Similarities, targets: &Tensor, same_image: &Tensor, label_smoothing: f64) -> Tensor {
    (cross_entropy(&s.i2t, targets, same_image, label_smoothing)
        + cross_entropy(&s.t2i, targets, same_image, label_smoothing))
        * 0.5
}

/// Smoothed cross-entropy over the columns that stay; with none left out it is PyTorch's.
fn cross_entropy(logits: &Tensor, targets: &Tensor, left_out: &Tensor, smoothing: f64) -> Tensor {
    let log_p = logits.masked_fill(left_out, f64::NEG_INFINITY).log_softmax(-1, Kind::Float);
    let own = log_p.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
    let kept = left_out.logical_not().sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let all = log_p.masked_fill(left_out, 0.0).sum_dim_intlist([1i64].as_slice(), false, Kind::Float) / kept;
    -(own * (1.0 - smoothing) + all * smoothing).mean(Kind::Float)
}

/// The loss of equal similarities over `n` columns.
pub fn chance(n: usize) -> f64 {
    (n as f64).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Reduction};

    fn close(a: &Tensor, b: &Tensor) {
        assert!(a.allclose(b, 1e-6, 1e-6, false), "{a:?} {b:?}");
    }

    fn embeds(shape: &[i64]) -> Tensor {
        let x = Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let norm = x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true);
        x / norm
    }

    #[test]
    fn without_repeated_images_it_is_pytorch_s_smoothed_cross_entropy() {
        tch::manual_seed(0);
        let (i2t, t2i) =
            (Tensor::randn([5, 9], (Kind::Float, Device::Cpu)), Tensor::randn([5, 9], (Kind::Float, Device::Cpu)));
        let targets = Tensor::from_slice(&[2i64, 3, 4, 5, 6]);
        let ids = Tensor::arange(9, (Kind::Int64, Device::Cpu));
        let same = same_image_columns(&ids.narrow(0, 2, 5), &ids, &targets);
        let reference = |s: &Tensor| s.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Mean, -100, 0.1);
        let expected = (reference(&i2t) + reference(&t2i)) * 0.5;
        close(&loss(&Similarities { i2t, t2i }, &targets, &same, 0.1), &expected);
    }

    #[test]
    fn a_repeated_image_s_column_counts_as_if_it_were_not_there() {
        tch::manual_seed(1);
        let logits = Tensor::randn([4, 4], (Kind::Float, Device::Cpu));
        let targets = Tensor::arange(4, (Kind::Int64, Device::Cpu));
        let ids = Tensor::from_slice(&[7i64, 8, 7, 9]);
        let same = same_image_columns(&ids, &ids, &targets);
        // Row 0 without column 2, by hand.
        let row = logits.get(0).index_select(0, &Tensor::from_slice(&[0i64, 1, 3])).unsqueeze(0);
        let expected = row.cross_entropy_loss::<Tensor>(&Tensor::from_slice(&[0i64]), None, Reduction::Mean, -100, 0.1);
        let first = Tensor::from_slice(&[0i64]);
        close(&cross_entropy(&logits.narrow(0, 0, 1), &first, &same.narrow(0, 0, 1), 0.1), &expected);
    }

    #[test]
    fn columns_are_detached_on_both_sides() {
        tch::manual_seed(2);
        let images = embeds(&[3, 4, 8]).set_requires_grad(true);
        let texts = embeds(&[3, 8]).set_requires_grad(true);
        let temp = Tensor::from(0.07f32);
        let s = similarities(&images, &texts, &images, &texts, &temp);
        close(&s.i2t, &s.t2i.transpose(0, 1));
        s.i2t.sum(Kind::Float).backward();
        assert!(images.grad().defined() && !texts.grad().defined());
    }

    #[test]
    fn the_maximum_is_over_queries() {
        let images = Tensor::from_slice(&[1f32, 0., 0., 1., -1., 0., 0., -1.]).view([2, 2, 2]);
        let texts = Tensor::from_slice(&[1f32, 0., 0., 1.]).view([2, 2]);
        close(&best_query(&images, &texts), &Tensor::from_slice(&[1f32, 1., 0., 0.]).view([2, 2]));
    }
}
