//! Scaled dot-product attention, with keyed dropout on the CPU.

use tch::{Device, Kind, Tensor};

use crate::dropout::{DropoutKey, is_keyed};
use crate::ffi;

/// `dropout(softmax(q k^T / sqrt(D))) v`, differentiable once where it drops.
///
/// On CUDA, and in fp32 without dropout, it is libtorch's own attention. On the CPU with dropout, and in bf16 always
/// (libtorch's kernel takes twice the time there), it is two matrix products around one fused pass of scale, mask,
/// softmax and dropout, and four around one backward. The mask of query `n` of head `h`
/// is that of line `65536 h + n` in [`crate::dropout`], so it does not depend on how many queries or keys there are.
/// The dtypes of q, k and v decide on the CPU, not autocast. No query may be left without a key.
///
/// # Shapes
/// q: [B, H, N, D]; k, v: [B, H, M, D], all possibly views with strides; mask: bool, broadcastable to [B, H, N, M], true
/// where a query may attend; key.rows: `[B]`; returns: [B, H, N, D].
///
/// # Panics
/// Where shapes or dtypes do not fit, with `p` outside [0, 1] or `key.rows` not of length B.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, p: f64, key: Option<DropoutKey>) -> Tensor {
    match (q.device(), q.kind(), key.filter(|_| p > 0.0)) {
        (device, Kind::Float | Kind::BFloat16, Some(key)) if is_keyed(device) => fused(q, k, v, mask, p, key),
        (Device::Cpu, Kind::BFloat16, None) => {
            let rows = Tensor::zeros([q.size()[0]], (Kind::Int64, Device::Cpu));
            fused(q, k, v, mask, 0.0, DropoutKey { site: 0, rows: &rows })
        }
        (_, _, key) => {
            let p = key.map_or(0.0, |_| p);
            Tensor::scaled_dot_product_attention(q, k, v, mask, p, false, None, false)
        }
    }
}

fn fused(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, p: f64, key: DropoutKey) -> Tensor {
    // SAFETY: the pointers are live tensors for the call; the mask is live or null.
    ffi::expect(ffi::new_tensor("attention", |out| unsafe {
        ffi::torchx_dropout_attention(
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            ffi::optional(mask),
            p,
            key.site,
            key.rows.as_ptr(),
            out,
        )
    }))
}
