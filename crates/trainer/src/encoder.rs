//! The frozen image encoder with what stands before it: u8 pixels in, features out.

use blip2_model::Frozen;
use blip2_model::vision::{VisionConfig, VisionTower};
use blip2_torchx::autocast::autocast;
use blip2_torchx::pinned::to_device;
use tch::{Device, Kind, Tensor};

use crate::error::Error;

/// A tower with its channel means and deviations.
pub struct ImageEncoder {
    identity: String,
    tower: Frozen<VisionTower>,
    mean: Tensor,
    std: Tensor,
}

impl ImageEncoder {
    /// `normalisation`: means and deviations of red, green, blue. `identity` tells one encoder's features from another's.
    pub fn new(tower: Frozen<VisionTower>, normalisation: ([f64; 3], [f64; 3]), identity: String) -> ImageEncoder {
        let device = tower.params().device();
        let channels =
            |values: [f64; 3]| Tensor::from_slice(&values.map(|v| v as f32)).view([1, 3, 1, 1]).to_device(device);
        ImageEncoder { mean: channels(normalisation.0), std: channels(normalisation.1), tower, identity }
    }

    /// Equal for encoders that give the same features: weights, depth and dtype.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The device it computes on.
    pub fn device(&self) -> Device {
        self.tower.params().device()
    }

    /// Features of pixels as a host batch holds them.
    ///
    /// # Shapes
    /// `pixels u8 [B, 3, S, S]`, flat `-> f32 [B, N, width]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn features(&self, pixels: &[u8], batch: usize, size: usize) -> Result<Tensor, Error> {
        Ok(self.features_of_normalised(&self.normalise(pixels, batch, size)?))
    }

    /// Pixels as the tower takes them: on the device, scaled to [0, 1], normalised by channel.
    ///
    /// # Shapes
    /// `pixels u8 [B, 3, S, S]`, flat `-> f32 [B, 3, S, S]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn normalise(&self, pixels: &[u8], batch: usize, size: usize) -> Result<Tensor, Error> {
        let shape = [batch as i64, 3, size as i64, size as i64];
        let pixels = to_device(pixels, &shape, self.device())?.to_kind(Kind::Float) / 255.0;
        Ok((pixels - &self.mean) / &self.std)
    }

    /// Features of pixels that are already normalised, `f32 [B, 3, S, S] -> f32 [B, N, width]`.
    pub fn features_of_normalised(&self, pixels: &Tensor) -> Tensor {
        autocast(self.device(), None, || self.tower.features(pixels))
    }
}

/// Checks that images of `size` pixels suit a tower.
///
/// # Errors
/// When its patches do not tile them.
pub fn check_image_size(vision: &VisionConfig, size: usize) -> Result<(), Error> {
    let patch = vision.patch_size();
    if size as i64 % patch == 0 && size as i64 >= patch {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "data.image.size: expected a multiple of the image encoder's patch of {patch} pixels, got {size}"
    )))
}
