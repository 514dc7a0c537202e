//! Dropout whose masks are keyed, never drawn from a global generator.
//!
//! A mask is a pure function of where it is used (`site`), of the sample (`rows`) and of the element's place inside the
//! sample. So it depends neither on the batch a sample sits in nor on threads, and a resumed run needs no generator state.
//!
//! Element `(l, d)` of sample `r`, with `d` in the last dimension and `l` the flattened ones between, is kept iff its 16
//! bits of Philox4x32-10, counter `(d / 8, l, rows[r])` and key `site`, are at least `round(65536 p)`. So `p` is
//! rounded to a multiple of 1/65536 and what is kept is scaled by exactly `1 / (1 - p)` of the rounded `p`.
//!
//! On CUDA the mask is *not* keyed: it comes from the device's own generator, which the program begins anew where masks
//! must repeat ([`crate::rng`]).

use std::cell::Cell;

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

thread_local! {
    static AS_ON_CUDA: Cell<bool> = const { Cell::new(false) };
}

/// Whether masks on this device are keyed, and not drawn from its generator.
pub fn is_keyed(device: Device) -> bool {
    device == Device::Cpu && !AS_ON_CUDA.get()
}

/// Runs `work` with masks drawn on the CPU as they are on CUDA, so that what depends on it can be tested without one.
pub fn as_on_cuda<T>(work: impl FnOnce() -> T) -> T {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            AS_ON_CUDA.set(self.0);
        }
    }
    let _back = Back(AS_ON_CUDA.replace(true));
    work()
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
    match (is_keyed(x.device()), x.kind()) {
        (true, Kind::Float | Kind::BFloat16) => keyed(x, p, key),
        (true, kind) => {
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
