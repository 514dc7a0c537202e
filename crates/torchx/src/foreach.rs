//! Operators over lists of tensors that neither loop on the host nor wait for the device.

use tch::Tensor;

use crate::ffi;

/// The 2-norm of all elements of all tensors, accumulated in fp32, on their device.
///
/// # Shapes
/// tensors: any, on one device; returns: `[]` fp32 (zero on the CPU for an empty list).
pub fn norm(tensors: &[Tensor]) -> Tensor {
    let list = ffi::pointers(tensors);
    // SAFETY: the pointers are live tensors for the call.
    ffi::expect(ffi::new_tensor("foreach norm", |out| unsafe {
        ffi::torchx_foreach_norm(list.as_ptr(), list.len(), out)
    }))
}

/// Multiplies every tensor in place by one factor that stays on the device.
///
/// # Shapes
/// tensors: any; factor: `[]`.
pub fn mul_(tensors: &[Tensor], factor: &Tensor) {
    let list = ffi::pointers(tensors);
    // SAFETY: the pointers are live tensors for the call.
    let code = unsafe { ffi::torchx_foreach_mul_(list.as_ptr(), list.len(), factor.as_ptr()) };
    ffi::expect(ffi::check("foreach mul_", code));
}

/// Multiplies gradients in place by `inv_scale` and sets `found_inf` to 1 where any of them is not finite.
///
/// # Shapes
/// grads: any; found_inf, inv_scale: `[]` or `[1]`, fp32, on the gradients' device.
pub fn unscale_(grads: &[Tensor], found_inf: &Tensor, inv_scale: &Tensor) {
    let list = ffi::pointers(grads);
    // SAFETY: the pointers are live tensors for the call.
    let code =
        unsafe { ffi::torchx_foreach_unscale_(list.as_ptr(), list.len(), found_inf.as_ptr(), inv_scale.as_ptr()) };
    ffi::expect(ffi::check("foreach unscale_", code));
}
