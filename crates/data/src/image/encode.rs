//! From pixels to image files.

use std::io::Cursor;

use jpeg_encoder::{ColorType, Encoder};
use thiserror::Error;

use super::RgbImage;

/// Why an image cannot be encoded.
#[derive(Debug, Error)]
#[error("cannot encode {width} x {height} pixels as {format}: {reason}")]
pub struct EncodeError {
    format: &'static str,
    width: usize,
    height: usize,
    reason: String,
}

/// The image as a JPEG; below a `quality` of 90 (of 100) its colours have half the resolution.
///
/// # Errors
/// When a side is longer than JPEG allows (65,535 pixels).
pub fn encode_jpeg(image: &RgbImage, quality: u8) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = Vec::new();
    let written = match (u16::try_from(image.width), u16::try_from(image.height)) {
        (Ok(width), Ok(height)) => Encoder::new(&mut bytes, quality)
            .encode(&image.data, width, height, ColorType::Rgb)
            .map_err(|error| error.to_string()),
        _ => Err("a side is too long".to_owned()),
    };
    written.map(|()| bytes).map_err(|reason| failed("JPEG", image, reason))
}

/// The image as a PNG.
///
/// # Errors
/// When the image does not hold what its sides say.
pub fn encode_png(image: &RgbImage) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = Vec::new();
    let pixels = image::RgbImage::from_raw(image.width as u32, image.height as u32, image.data.clone());
    let pixels = pixels.ok_or_else(|| failed("PNG", image, format!("{} bytes", image.data.len())))?;
    let written = pixels.write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png);
    written.map(|()| bytes).map_err(|error| failed("PNG", image, error.to_string()))
}

fn failed(format: &'static str, image: &RgbImage, reason: String) -> EncodeError {
    EncodeError { format, width: image.width, height: image.height, reason }
}
