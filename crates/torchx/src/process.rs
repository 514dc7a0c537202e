//! This process as such: which libtorch it has loaded, and its end.

use crate::ffi;

/// The version of the libtorch that was loaded, which need not be the one that the program was built with: `2.11.0`.
pub fn libtorch_version() -> String {
    // SAFETY: a constant of the library.
    let version = unsafe { ffi::aoti_torch_abi_version() };
    let byte = |at: u32| version >> (56 - 8 * at) & 0xFF;
    format!("{}.{}.{}", byte(0), byte(1), byte(2))
}

/// Ends the process at once, without the destructors and handlers of its libraries: those of CUDA and NCCL may wait for a
/// device or a peer that never answers.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: a system call that does not return.
    unsafe { ffi::torchx_exit(code.into()) }
}
