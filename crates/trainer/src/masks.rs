//! Dropout's masks where libtorch draws them one after the other, as on CUDA: the generator is begun anew where they must repeat. Masks that
//! are keyed need none of this.

use blip2_torchx::{dropout, rng};
use tch::Device;

use crate::error::Error;

/// Begins a step: a resumed run draws the same masks, and no two ranks do.
pub(crate) fn begin_step(device: Device, seed: u64, step: u64, rank: usize) -> Result<(), Error> {
    if dropout::is_keyed(device) {
        return Ok(());
    }
    Ok(rng::seed(device, mix(mix(seed, step), rank as u64))?)
}

/// The masks of a step's micro-batches, each of which can be gone over again.
pub(crate) struct StepMasks {
    device: Device,
    /// The step's seed, where masks are drawn.
    seed: Option<u64>,
}

impl StepMasks {
    /// To be called before the step's first mask is drawn.
    pub(crate) fn new(device: Device) -> Result<StepMasks, Error> {
        let seed = if dropout::is_keyed(device) { None } else { Some(rng::current_seed(device)?) };
        Ok(StepMasks { device, seed })
    }

    /// From here on masks are those of this micro-batch, the same each time. The host waits for nothing.
    pub(crate) fn begin(&self, micro_batch: usize) -> Result<(), Error> {
        match self.seed {
            Some(seed) => Ok(rng::seed(self.device, mix(seed, micro_batch as u64))?),
            None => Ok(()),
        }
    }
}

fn mix(seed: u64, number: u64) -> u64 {
    rng::finalise(seed.wrapping_add((number.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}
