//! Which kernels `scaled_dot_product_attention` may choose from.

use crate::ffi;

/// The switches of libtorch's attention kernels, for the whole process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backends {
    /// Flash attention (CUDA and CPU).
    pub flash: bool,
    /// Memory-efficient attention (CUDA).
    pub efficient: bool,
    /// The composed operators, always able.
    pub math: bool,
    /// cuDNN's attention (CUDA).
    pub cudnn: bool,
}

impl Backends {
    /// The switches as they stand.
    pub fn get() -> Self {
        // SAFETY: reads process-wide flags.
        let bits = unsafe { ffi::torchx_sdpa_get() };
        Self { flash: bits & 1 != 0, efficient: bits & 2 != 0, math: bits & 4 != 0, cudnn: bits & 8 != 0 }
    }

    /// Puts these switches in force.
    pub fn set(self) {
        let bits = i32::from(self.flash)
            | i32::from(self.efficient) << 1
            | i32::from(self.math) << 2
            | i32::from(self.cudnn) << 3;
        // SAFETY: writes process-wide flags.
        unsafe { ffi::torchx_sdpa_set(bits) }
    }
}
