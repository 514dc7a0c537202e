//! Dropout, residual sum and layer normalisation in one pass: the end of every BERT sublayer.

use tch::{Kind, Tensor};

use crate::dropout::{DropoutKey, dropout, is_keyed};
use crate::ffi;

/// `LN(dropout(x) + residual)`, differentiable once.
///
/// The sum, the statistics and the normalisation are fp32 whatever the inputs; the result has the residual's dtype, so
/// that a residual stream in fp32 stays one between linear layers that answer in bf16. The mask is that of `dropout(x, p, key)`. On the CPU fp32 and bf16
/// are fused, one pass forward and one backward, which draws the mask again from the key; elsewhere the operators are
/// composed.
///
/// # Shapes
/// x, residual: [R, ..., D], each fp32 or bf16; weight, bias: `[D]`; returns: [R, ..., D].
///
/// # Panics
/// Where the shapes differ, with `p` outside [0, 1] or `key.rows` not of length R.
pub fn dropout_add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    p: f64,
    key: Option<DropoutKey>,
) -> Tensor {
    let key = key.filter(|_| p > 0.0);
    let weight = weight.to_kind(Kind::Float);
    let bias = bias.to_kind(Kind::Float);
    let is_fusable = |t: &Tensor| is_keyed(t.device()) && matches!(t.kind(), Kind::Float | Kind::BFloat16);
    if is_fusable(x) && is_fusable(residual) {
        return fused(x, residual, &weight, &bias, eps, p, key);
    }
    let dropped = match key {
        Some(key) => dropout(x, p, key),
        None => x.shallow_clone(),
    };
    let sum = dropped.to_kind(Kind::Float) + residual.to_kind(Kind::Float);
    sum.layer_norm(weight.size(), Some(&weight), Some(&bias), eps, true).to_kind(residual.kind())
}

fn fused(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    p: f64,
    key: Option<DropoutKey>,
) -> Tensor {
    // SAFETY: the pointers are live tensors for the call; without a key p is 0 and the rows are null.
    ffi::expect(ffi::new_tensor("dropout_add_layer_norm", |out| unsafe {
        ffi::torchx_dropout_add_layer_norm(
            x.as_ptr(),
            residual.as_ptr(),
            weight.as_ptr(),
            bias.as_ptr(),
            eps,
            key.map_or(0.0, |_| p),
            key.map_or(0, |key| key.site),
            ffi::optional(key.map(|key| key.rows)),
            out,
        )
    }))
}
