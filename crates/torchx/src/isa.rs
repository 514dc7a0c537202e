//! The instruction set of the fused CPU kernels. Results do not depend on it; speed does.

use std::ffi::CStr;
use std::fmt;

use crate::ffi;

/// An instruction set that the kernels were compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// What every machine of the architecture has.
    Baseline,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

impl Isa {
    /// All of them, the slowest first.
    pub const ALL: [Isa; 3] = [Isa::Baseline, Isa::Avx2, Isa::Avx512];

    /// The one in use: the best this machine has, unless [`Isa::set`] chose another.
    pub fn get() -> Self {
        // SAFETY: the shim answers with a static string.
        let name = unsafe { CStr::from_ptr(ffi::torchx_isa_get()) };
        Self::ALL.into_iter().find(|isa| isa.name() == name).unwrap_or(Self::Baseline)
    }

    /// Chooses one for the whole process, to compare them; false where this machine lacks it.
    pub fn set(self) -> bool {
        // SAFETY: a NUL-terminated static string.
        unsafe { ffi::torchx_isa_set(self.name().as_ptr()) != 0 }
    }

    fn name(self) -> &'static CStr {
        match self {
            Isa::Baseline => c"baseline",
            Isa::Avx2 => c"avx2",
            Isa::Avx512 => c"avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_string_lossy())
    }
}
