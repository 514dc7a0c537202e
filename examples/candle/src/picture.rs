//! From an image file to pixels, as `preprocessor_config.json` says: squeezed to a square, scaled, normalised.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{Device, Tensor};
use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde::Deserialize;

use crate::model_dir::read_json;
use crate::vision::VisionTower;

/// The keys that are read; what is left out follows the tower.
#[derive(Deserialize)]
struct File {
    size: Option<Size>,
    resample: Option<u8>,
    rescale_factor: Option<f32>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Side(u32),
    Sides { height: u32, width: u32 },
}

/// How pictures become pixels.
pub struct Preprocessing {
    size: u32,
    filter: FilterType,
    rescale_factor: f32,
    mean: [f32; 3],
    std: [f32; 3],
}

impl Preprocessing {
    /// Reads `preprocessor_config.json` where the directory has one.
    pub fn load(dir: &Path, vision: &VisionTower) -> Result<Preprocessing> {
        let path = dir.join("preprocessor_config.json");
        let file: File = match path.exists() {
            true => serde_json::from_value(read_json(&path)?).with_context(|| path.display().to_string())?,
            false => File { size: None, resample: None, rescale_factor: None, image_mean: None, image_std: None },
        };
        let size = match file.size {
            None => vision.image_size as u32,
            Some(Size::Side(side)) => side,
            Some(Size::Sides { height, width }) if height == width => height,
            Some(Size::Sides { height, width }) => {
                bail!("{}: size: expected a square, got {height} x {width}", path.display())
            }
        };
        if !(1..=4096).contains(&size) {
            bail!("{}: size: expected 1 to 4096 pixels, got {size}", path.display());
        }
        // PIL's numbers.
        let filter = match file.resample.unwrap_or(3) {
            1 => FilterType::Lanczos3,
            2 => FilterType::Bilinear,
            3 => FilterType::CatmullRom,
            4 => FilterType::Box,
            5 => FilterType::Hamming,
            other => bail!("{}: resample: expected 1 to 5, got {other}", path.display()),
        };
        Ok(Preprocessing {
            size,
            filter,
            rescale_factor: file.rescale_factor.unwrap_or(1.0 / 255.0),
            mean: file.image_mean.unwrap_or(vision.normalisation.0),
            std: file.image_std.unwrap_or(vision.normalisation.1),
        })
    }

    /// Reads a JPEG, PNG or WebP: `[1, 3, size, size]`.
    pub fn pixels(&self, path: &Path, device: &Device) -> Result<Tensor> {
        let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let picture = image::load_from_memory(&bytes).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let (width, height) = (picture.width(), picture.height());
        let rgb = match picture.color().has_alpha() {
            true => on_white(picture.into_rgba8().as_raw()),
            false => picture.into_rgb8().into_raw(),
        };
        let side = self.size as usize;
        let source = Image::from_vec_u8(width, height, rgb, PixelType::U8x3)?;
        let mut square = Image::new(self.size, self.size, PixelType::U8x3);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(self.filter));
        Resizer::new().resize(&source, &mut square, &options)?;
        let pixel = |channel: usize, at: usize| f32::from(square.buffer()[3 * at + channel]) * self.rescale_factor;
        let normalised = (0..3).flat_map(|c| (0..side * side).map(move |at| (c, at)));
        let normalised = normalised.map(|(c, at)| (pixel(c, at) - self.mean[c]) / self.std[c]).collect();
        Ok(Tensor::from_vec(normalised, (1, 3, side, side), device)?)
    }
}

/// Lays RGBA pixels on a white ground, as in training.
fn on_white(rgba: &[u8]) -> Vec<u8> {
    let (pixels, _) = rgba.as_chunks::<4>();
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    pixels.iter().flat_map(|&[red, green, blue, alpha]| [red, green, blue].map(|colour| blend(colour, alpha))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transparent_pixels_are_white() {
        assert_eq!(on_white(&[10, 20, 30, 0, 10, 20, 30, 255]), [255, 255, 255, 10, 20, 30]);
    }
}
