//! Whether a GPU may compute fp32 with the 10 bits of TF32.

use crate::ffi;

/// The switches of libtorch's fp32 on CUDA, for the whole process. By default convolutions may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tf32 {
    /// cuDNN's convolutions.
    pub convolutions: bool,
    /// cuBLAS' matrix products.
    pub products: bool,
}

impl Tf32 {
    /// fp32 is fp32.
    pub const OFF: Self = Self { convolutions: false, products: false };

    /// The switches as they stand.
    pub fn get() -> Self {
        // SAFETY: reads process-wide flags.
        let bits = unsafe { ffi::torchx_tf32_get() };
        Self { convolutions: bits & 1 != 0, products: bits & 2 != 0 }
    }

    /// Puts these switches in force.
    pub fn set(self) {
        // SAFETY: writes process-wide flags.
        unsafe { ffi::torchx_tf32_set(i32::from(self.convolutions) | i32::from(self.products) << 1) }
    }
}
