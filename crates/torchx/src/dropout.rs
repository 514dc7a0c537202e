//! Dropout whose masks are keyed, never drawn from a global generator.
//!
//! A mask is a pure function of where it is used (`site`), of the sample (`rows`) and of the element's place inside the
//! sample. So it depends neither on the batch a sample sits in nor on threads, and a resumed run needs no generator state.
//!
//! Element `(l, d)` of sample `r`, with `d` in the last dimension and `l` the flattened ones between, is kept iff its 16
//! bits of Philox4x32-10, counter `(d / 8, l, rows[r])` and key `site`, are at least `round(65536 p)`. So `p` is
//! rounded to a multiple of 1/65536 and what is kept is scaled by exactly `1 / (1 - p)` of the rounded `p`.
//!
//! On CUDA the mask is *not* keyed: it comes from the device's own generator, whose state belongs into the checkpoint
//! ([`crate::rng`]).

use tch::{Device, Kind, Tensor};

use crate::ffi;

pub use crate::attention::attention;
pub use crate::layer_norm::dropout_add_layer_norm;

/// What a dropout mask is made from.
///
/// Two uses of one `(site, row)` pair draw the same mask: give every dropout in the network and every step its own.
#[derive(Debug, Clone, Copy)]
pub struct DropoutKey<'a> {
    /// Mixes the run's seed with the place in the network.
    pub site: u64,
    /// Each sample's own stream, made from its position in the training stream.
    ///
    /// # Shapes
    /// `[R]` int64 on the CPU, R being the first dimension of what is dropped.
    pub rows: &'a Tensor,
}

/// Zeroes elements with probability `p` and scales the others by `1 / (1 - p)`; differentiable once.
///
/// On the CPU fp32 and bf16 are fused; other dtypes multiply with an fp32 mask.
///
/// # Shapes
/// x: [R, ...] of two or more dimensions; returns: the same.
///
/// # Panics
/// With `p` outside [0, 1] or `rows` of another length.
pub fn dropout(x: &Tensor, p: f64, key: DropoutKey) -> Tensor {
    if p == 0.0 {
        return x.shallow_clone();
    }
    match (x.device(), x.kind()) {
        (Device::Cpu, Kind::Float | Kind::BFloat16) => keyed(x, p, key),
        (Device::Cpu, kind) => {
            let factors = keyed(&Tensor::ones(x.size(), (Kind::Float, Device::Cpu)), p, key);
            x * factors.to_kind(kind)
        }
        _ => x.dropout(p, true),
    }
}

fn keyed(x: &Tensor, p: f64, key: DropoutKey) -> Tensor {
    // SAFETY: the pointers are live tensors for the call.
    ffi::expect(ffi::new_tensor("dropout", |out| unsafe {
        ffi::torchx_dropout(x.as_ptr(), p, key.site, key.rows.as_ptr(), out)
    }))
}
