//! Image features of a batch: computed by the frozen encoder, or kept in memory or on disk after the first time.

pub mod cache;
pub(crate) mod disk;
pub mod encoder;
pub(crate) mod memory;
mod stored_numbers;

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use blip2_data::{HostBatch, Quarantined};
use tch::{Kind, Tensor};

use crate::error::Error;
use crate::features::disk::DiskFeatures;
use crate::features::encoder::ImageEncoder;
use crate::features::memory::MemoryCache;

/// Images encoded at once when a cache is filled ahead of training.
pub(crate) const ENCODE_BATCH: usize = 32;

/// Where features come from.
pub(crate) enum Features {
    /// From the batch's pixels.
    Encode,
    /// From memory, by the sample's index.
    Memory(Rc<MemoryCache>),
    /// From a store on disk, and from the pixels of what is not there yet.
    Disk(DiskFeatures),
}

impl Features {
    /// Features of a batch, on the encoder's device, `[B, N, width]`.
    ///
    /// # Errors
    /// When the device refuses, or the batch lacks what is needed.
    pub fn of(&self, batch: &HostBatch, encoder: &ImageEncoder) -> Result<Tensor, Error> {
        match self {
            Features::Encode => encode(batch, encoder),
            Features::Memory(cache) => Ok(cache.rows(&batch.sample_index)?.to_device(encoder.device())),
            Features::Disk(features) => features.of(batch, encoder),
        }
    }

    /// A dtype that holds the features exactly.
    pub fn kind(&self, encoder: &ImageEncoder) -> Kind {
        match self {
            Features::Encode => encoder.kind(),
            Features::Memory(_) => Kind::BFloat16,
            Features::Disk(disk) => disk.numbers().kind(),
        }
    }

    /// Whether the loader has to decode images.
    pub fn needs_pixels(&self) -> bool {
        !matches!(self, Features::Memory(_))
    }

    /// What could not be read when memory was filled.
    pub fn quarantined(&self) -> &[Quarantined] {
        match self {
            Features::Memory(cache) => cache.quarantined(),
            Features::Encode | Features::Disk(_) => &[],
        }
    }

    /// The same, as what a reader leaves out.
    pub fn left_out(&self) -> Arc<HashSet<u64>> {
        Arc::new(self.quarantined().iter().map(|sample| sample.index).collect())
    }

    /// The store on disk, where there is one.
    pub fn disk(&self) -> Option<&DiskFeatures> {
        match self {
            Features::Disk(disk) => Some(disk),
            Features::Encode | Features::Memory(_) => None,
        }
    }
}

/// Features of a batch that has its pixels, `[B, N, width]`.
pub(crate) fn encode(batch: &HostBatch, encoder: &ImageEncoder) -> Result<Tensor, Error> {
    let pixels = batch.pixels.as_deref().ok_or(Error::NoPixels)?;
    encoder.features(pixels, batch.size, batch.image_size)
}
