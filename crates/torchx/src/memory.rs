//! How much memory a device's tensors and the process take.

use tch::Device;

use crate::device::cuda_index;
use crate::ffi;

/// What libtorch's caching allocator holds on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in live tensors.
    pub allocated_bytes: u64,
    /// Bytes taken from the driver, the cache included.
    pub reserved_bytes: u64,
    /// The most bytes ever in live tensors since the start or [`reset_peak`].
    pub peak_allocated_bytes: u64,
}

/// The allocator's figures; none on the CPU, which has no such allocator.
pub fn stats(device: Device) -> Option<MemoryStats> {
    let index = cuda_index(device)?;
    let (mut allocated, mut reserved, mut peak) = (0, 0, 0);
    // SAFETY: the three out pointers are live for the call.
    let code = unsafe { ffi::torchx_memory_stats(index, &mut allocated, &mut reserved, &mut peak) };
    ffi::check("memory statistics", code).ok()?;
    Some(MemoryStats {
        allocated_bytes: u64::try_from(allocated).ok()?,
        reserved_bytes: u64::try_from(reserved).ok()?,
        peak_allocated_bytes: u64::try_from(peak).ok()?,
    })
}

/// Lets the peak start again from what is allocated now; nothing on the CPU.
pub fn reset_peak(device: Device) {
    if let Some(index) = cuda_index(device) {
        // SAFETY: plain call by value; exceptions come back as a code.
        ffi::expect(ffi::check("reset peak memory", unsafe { ffi::torchx_memory_reset_peak(index) }));
    }
}

/// Has this process keep the memory of CPU tensors that the main thread frees for the next ones; other threads' largest blocks are given back all
/// the same.
///
/// The C library gives large blocks back to the system, so that each step of a training finds its activations and gradients as pages that have
/// to be mapped and cleared once more, which takes up to a third of the step. [`crate::device::select`] calls this for the CPU.
pub fn keep_freed() {
    // SAFETY: sets two parameters of the C library's allocator, under its own lock.
    unsafe { ffi::torchx_memory_keep_freed() }
}

/// The resident memory of this process, where the system says.
pub fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// The most resident memory this process has had, where the system says.
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
