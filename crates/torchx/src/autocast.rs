//! Mixed precision by device and dtype. tch's own `autocast` does nothing without CUDA and knows no bf16.

use tch::{Device, Kind, Tensor};

use crate::device::cuda_index;
use crate::ffi;

/// Runs `f` with autocast to `kind` on `device`, or with autocast off where `kind` is none.
///
/// Calls nest, an inner one rules while it runs, and what was set before comes back at the end, a panic included. The
/// half-precision copies of fp32 parameters are kept until the outermost call ends, so a parameter is cast once per
/// step; a parameter first cast under `no_grad` inside that call stays without gradient until then.
///
/// # Panics
/// With a `kind` other than `Half` and `BFloat16`.
pub fn autocast<T>(device: Device, kind: Option<Kind>, f: impl FnOnce() -> T) -> T {
    let _scope = Scope::enter(device, kind);
    f()
}

/// `x` as autocast hands it to a linear layer: cast once where several layers read it. `x` itself where autocast is off.
pub fn cast(x: &Tensor) -> Tensor {
    // SAFETY: plain call by value.
    match unsafe { ffi::torchx_autocast_kind(i32::from(cuda_index(x.device()).is_some())) } {
        HALF => x.to_kind(Kind::Half),
        BFLOAT16 => x.to_kind(Kind::BFloat16),
        _ => x.shallow_clone(),
    }
}

/// c10::ScalarType's numbers.
const HALF: i32 = 5;
const BFLOAT16: i32 = 15;

struct Scope {
    cuda: i32,
    previous_enabled: i32,
    previous_kind: i32,
}

impl Scope {
    fn enter(device: Device, kind: Option<Kind>) -> Self {
        let kind = match kind {
            None => -1,
            Some(Kind::Half) => HALF,
            Some(Kind::BFloat16) => BFLOAT16,
            Some(other) => panic!("autocast to {other:?}; only Half and BFloat16 are reduced precisions"),
        };
        let mut scope = Scope { cuda: i32::from(cuda_index(device).is_some()), previous_enabled: 0, previous_kind: 0 };
        // SAFETY: both out pointers are live for the call.
        let code = unsafe {
            ffi::torchx_autocast_enter(scope.cuda, kind, &mut scope.previous_enabled, &mut scope.previous_kind)
        };
        ffi::expect(ffi::check("autocast", code));
        scope
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // SAFETY: plain call by value. Its code is left: these setters throw for unknown device types alone.
        unsafe {
            ffi::torchx_autocast_exit(self.cuda, self.previous_enabled, self.previous_kind);
        }
    }
}
