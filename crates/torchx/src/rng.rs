//! libtorch's own generators, which are begun anew where their numbers must repeat; and what keyed numbers are made with.

use tch::Device;

use crate::device::cuda_index;
use crate::error::Error;
use crate::ffi;

/// SplitMix64's finaliser: a bijection in which every input bit moves half of the output bits. What a seed means rests on it.
pub fn finalise(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Begins a device's default generator anew.
///
/// # Errors
/// [`Error::Torch`] where the device is not there.
pub fn seed(device: Device, seed: u64) -> Result<(), Error> {
    let index = cuda_index(device).unwrap_or(-1);
    // SAFETY: plain call by value; exceptions come back as a code.
    ffi::check("seed generator", unsafe { ffi::torchx_rng_seed(index, seed) })
}

/// What [`seed`] last set, however much was drawn since.
///
/// # Errors
/// [`Error::Torch`] where the device is not there.
pub fn current_seed(device: Device) -> Result<u64, Error> {
    let index = cuda_index(device).unwrap_or(-1);
    let mut seed = 0;
    // SAFETY: the out pointer is live for the call.
    ffi::check("read generator seed", unsafe { ffi::torchx_rng_seed_get(index, &mut seed) })?;
    Ok(seed)
}
