//! Multi-head attention, as all four transformers of the model compute it.

use candle_core::{Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{Linear, VarBuilder, linear_b};

/// A linear layer with a bias where the file has one.
pub fn linear(input: usize, output: usize, vb: VarBuilder) -> Result<Linear> {
    let bias = vb.contains_tensor("bias");
    linear_b(input, output, bias, vb)
}

/// `[1, L, heads * size] -> [1, heads, L, size]`
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, rows, width) = x.dims3()?;
    x.reshape((batch, rows, heads, width / heads))?.transpose(1, 2)?.contiguous()
}

/// `[1, heads, L, size] -> [1, L, heads * size]`
fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, rows, size) = x.dims4()?;
    x.transpose(1, 2)?.reshape((batch, rows, heads * size))
}

/// What a softmax is taken of: `q k^T scale + bias`.
#[derive(Clone, Copy)]
pub struct Scores<'a> {
    /// Factor of the products; T5 has 1, all others one over the root of the head's size.
    pub scale: f64,
    /// Masks and relative positions, broadcast to `[1, heads, rows of q, rows of k]`.
    pub bias: Option<&'a Tensor>,
}

impl Scores<'_> {
    /// The usual scale for heads of `size`, nothing masked.
    pub fn plain(size: usize) -> Scores<'static> {
        Scores { scale: 1.0 / (size as f64).sqrt(), bias: None }
    }
}

/// `q [1, heads, L, size]`, `k` and `v [1, heads, K, size] -> [1, L, heads * size]`
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores) -> Result<Tensor> {
    let products = (q.matmul(&k.t()?.contiguous()?)? * scores.scale)?;
    let products = match scores.bias {
        Some(bias) => products.broadcast_add(bias)?,
        None => products,
    };
    merge_heads(&softmax_last_dim(&products)?.matmul(v)?)
}
