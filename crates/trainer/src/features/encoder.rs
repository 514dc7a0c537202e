//! The frozen image encoder with what stands before it: u8 pixels in, features out.

use std::cell::OnceCell;

use blip2_data::feature_store::EncoderIdentity;
use blip2_model::Frozen;
use blip2_model::vision::{VisionConfig, VisionTower};
use blip2_torchx::autocast::autocast;
use blip2_torchx::params::ParamStore;
use blip2_torchx::pinned::to_device;
use tch::{Device, Kind, Tensor};

use crate::assembly::preprocessing::Preprocessing;
use crate::error::Error;

/// A tower with what is done to its pixels.
pub struct ImageEncoder {
    identity: String,
    tower: Frozen<VisionTower>,
    config: VisionConfig,
    depth: i64,
    preprocessing: Preprocessing,
    mean: Tensor,
    std: Tensor,
    /// Once it was asked for: a digest of every weight takes a while.
    stored_identity: OnceCell<EncoderIdentity>,
}

impl ImageEncoder {
    /// The first `depth` blocks of the tower that `config` describes. `identity` tells one encoder's features from another's.
    pub fn new(
        tower: Frozen<VisionTower>,
        config: VisionConfig,
        depth: i64,
        preprocessing: Preprocessing,
        identity: String,
    ) -> ImageEncoder {
        let device = tower.params().device();
        let channels =
            |values: [f64; 3]| Tensor::from_slice(&values.map(|v| v as f32)).view([1, 3, 1, 1]).to_device(device);
        let (mean, std) = (channels(preprocessing.mean), channels(preprocessing.std));
        ImageEncoder { mean, std, tower, config, depth, preprocessing, identity, stored_identity: OnceCell::new() }
    }

    /// What is done to a picture before the tower sees it.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// Equal for encoders that give the same features: weights, depth and dtype.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// What features on disk are told apart by: a digest of the architecture and of every number that this encoder computes with, wherever
    /// it was read from.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn stored_identity(&self) -> Result<EncoderIdentity, Error> {
        if let Some(known) = self.stored_identity.get() {
            return Ok(known.clone());
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}", self.config.architecture()).as_bytes());
        for (name, tensor, _) in self.tower.params().entries() {
            hasher.update(format!("\0{name} {:?}\0", tensor.size()).as_bytes());
            let bytes = tensor.to_device(Device::Cpu).contiguous().view([-1]).view_dtype(Kind::Uint8);
            let mut copy = vec![0u8; bytes.numel()];
            bytes.f_copy_data(&mut copy, bytes.numel())?;
            hasher.update(&copy);
        }
        let dtype = match self.tower.params().kind() {
            Kind::Float => "fp32".to_owned(),
            Kind::BFloat16 => "bf16".to_owned(),
            Kind::Half => "fp16".to_owned(),
            other => format!("{other:?}"),
        };
        let found = EncoderIdentity { weights: hasher.finalize().to_hex().to_string(), layer: self.depth, dtype };
        Ok(self.stored_identity.get_or_init(|| found).clone())
    }

    /// Tokens of an image's features, and numbers of a token.
    pub(crate) fn feature_shape(&self) -> (i64, i64) {
        (self.config.tokens(self.preprocessing.size as i64), self.config.hidden_size())
    }

    /// Its weights.
    pub fn params(&self) -> &ParamStore {
        self.tower.params()
    }

    /// The dtype of its weights, which its features have too.
    pub fn kind(&self) -> Kind {
        self.tower.params().kind()
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

    /// Pixels as the tower takes them: on the device, rescaled (to [0, 1], by default), normalised by channel.
    ///
    /// # Shapes
    /// `pixels u8 [B, 3, S, S]`, flat `-> f32 [B, 3, S, S]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn normalise(&self, pixels: &[u8], batch: usize, size: usize) -> Result<Tensor, Error> {
        let shape = [batch as i64, 3, size as i64, size as i64];
        // A division, so that 1/255 scales as exactly as it can.
        let scale = 1.0 / self.preprocessing.rescale_factor;
        let pixels = to_device(pixels, &shape, self.device())?.to_kind(Kind::Float) / scale;
        Ok((pixels - &self.mean) / &self.std)
    }

    /// Features of pixels that are already normalised, `f32 [B, 3, S, S] -> f32 [B, N, width]`.
    ///
    /// Their values are those of the tower's dtype, as a tower in `transformers` gives them, though its residual stream is kept in fp32 here: so
    /// what a cache stores or another rank is sent in that dtype is what is trained on without either.
    pub fn features_of_normalised(&self, pixels: &Tensor) -> Tensor {
        autocast(self.device(), None, || self.tower.features(pixels).to_kind(self.kind()).to_kind(Kind::Float))
    }
}

/// Checks that images of `size` pixels suit a tower.
///
/// # Errors
/// When its patches do not tile them, or its positions are bound to another size.
pub fn check_image_size(vision: &VisionConfig, size: usize) -> Result<(), Error> {
    vision.check_size(size as i64).map_err(|expected| Error::key("data.image.size", expected, size, ""))
}
