//! JPEG, PNG and WebP to RGB, JPEGs with Pillow's pixels to the bit. The format is taken from the bytes, since file names are often wrong; the size is taken
//! from the header and checked before anything is allocated for it.
//!
//! What the decoder of JPEGs objects to goes to a second one, whose word is the last: no file is lost that either can read, and one that is cut is
//! refused and not filled up.
//!
//! Grey and CMYK become RGB, 16 bits a channel become 8, transparent pixels are laid on white, and an animation is its
//! first frame. EXIF orientation is not applied, as in the reference.

use std::io::Cursor;

use image::codecs::{png::PngDecoder, webp::WebPDecoder};
use image::{DynamicImage, ImageDecoder, Limits};
use thiserror::Error;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::turbo::decode_turbo;
use super::{RgbImage, Scale};

/// The longest side that is decoded.
pub const MAX_SIDE: usize = 16_384;
/// The most pixels that are decoded.
pub const MAX_PIXELS: usize = 100_000_000;
/// The most a PNG or WebP decoder may allocate: 16-bit RGBA of the largest image.
const MAX_ALLOC_BYTES: u64 = 8 * MAX_PIXELS as u64;

/// Why an image cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The file has zero bytes.
    #[error("the file is empty")]
    Empty,
    /// The bytes begin as no known format does.
    #[error("neither JPEG, PNG nor WebP (it begins with {0:02x?})")]
    UnknownFormat(Vec<u8>),
    /// The header claims more than is decoded.
    #[error("claims {width} x {height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all are decoded")]
    TooLarge {
        /// Pixels a row.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// The header claims a side of zero.
    #[error("claims {width} x {height} pixels")]
    NoPixels {
        /// Pixels a row.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// The decoder found the file damaged.
    #[error("damaged {format}: {reason}")]
    Damaged {
        /// What the file is.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
}

/// The formats that are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImageFormat {
    /// JPEG, baseline or progressive.
    Jpeg,
    /// PNG.
    Png,
    /// WebP, lossy or lossless.
    WebP,
}

impl ImageFormat {
    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
        }
    }

    /// The extension of a member of this format.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Jpeg => "jpg",
            Self::Png => "png",
            Self::WebP => "webp",
        }
    }

    fn of(bytes: &[u8]) -> Result<Self, DecodeError> {
        match bytes {
            [] => Err(DecodeError::Empty),
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::WebP),
            _ => Err(DecodeError::UnknownFormat(bytes[..bytes.len().min(8)].to_vec())),
        }
    }

    fn damaged(self, error: impl ToString) -> DecodeError {
        let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        DecodeError::Damaged { format: self.name(), reason }
    }
}

/// Decodes an image file.
///
/// # Errors
/// When the file is damaged or cut, larger than [`MAX_SIDE`] or [`MAX_PIXELS`], or of another format.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    let (format, width, height) = inspect(bytes)?;
    decode_inspected(bytes, format, (width, height))
}

/// Decodes an image file of which [`inspect`] has told format and sides.
pub(super) fn decode_inspected(
    bytes: &[u8],
    format: ImageFormat,
    sides: (usize, usize),
) -> Result<RgbImage, DecodeError> {
    match format {
        ImageFormat::Jpeg => match decode_turbo(bytes, Scale::Full, sides) {
            Some(image) => Ok(image),
            None => decode_zune(bytes, sides),
        },
        ImageFormat::Png => decode_with(png(bytes)?, format),
        ImageFormat::WebP => decode_with(webp(bytes)?, format),
    }
}

/// Format, width and height of an image file, from its header alone.
///
/// # Errors
/// As [`decode`], for what the header shows.
pub fn inspect(bytes: &[u8]) -> Result<(ImageFormat, usize, usize), DecodeError> {
    let format = ImageFormat::of(bytes)?;
    let (width, height) = match format {
        ImageFormat::Jpeg => jpeg_dimensions(&jpeg(bytes)?)?,
        ImageFormat::Png => dimensions(&png(bytes)?),
        ImageFormat::WebP => dimensions(&webp(bytes)?),
    };
    check_size(width, height)?;
    Ok((format, width, height))
}

fn check_size(width: usize, height: usize) -> Result<(), DecodeError> {
    if width == 0 || height == 0 {
        return Err(DecodeError::NoPixels { width, height });
    }
    if width.max(height) > MAX_SIDE || width.saturating_mul(height) > MAX_PIXELS {
        return Err(DecodeError::TooLarge { width, height });
    }
    Ok(())
}

/// A JPEG decoder that has read its headers.
fn jpeg(bytes: &[u8]) -> Result<JpegDecoder<ZCursor<&[u8]>>, DecodeError> {
    // Strict, since otherwise a cut file is filled up with grey. Our own limits speak, not the decoder's.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|error| ImageFormat::Jpeg.damaged(error))?;
    Ok(decoder)
}

fn jpeg_dimensions(decoder: &JpegDecoder<ZCursor<&[u8]>>) -> Result<(usize, usize), DecodeError> {
    decoder.dimensions().ok_or_else(|| ImageFormat::Jpeg.damaged("no frame header"))
}

fn decode_zune(bytes: &[u8], (width, height): (usize, usize)) -> Result<RgbImage, DecodeError> {
    let data = jpeg(bytes)?.decode().map_err(|error| ImageFormat::Jpeg.damaged(error))?;
    if data.len() != width * height * 3 {
        let reason = format!("{} bytes for {width} x {height} pixels", data.len());
        return Err(ImageFormat::Jpeg.damaged(reason));
    }
    Ok(RgbImage { width, height, data })
}

fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_ALLOC_BYTES);
    limits
}

fn png(bytes: &[u8]) -> Result<PngDecoder<Cursor<&[u8]>>, DecodeError> {
    PngDecoder::with_limits(Cursor::new(bytes), limits()).map_err(|error| ImageFormat::Png.damaged(error))
}

fn webp(bytes: &[u8]) -> Result<WebPDecoder<Cursor<&[u8]>>, DecodeError> {
    WebPDecoder::new(Cursor::new(bytes)).map_err(|error| ImageFormat::WebP.damaged(error))
}

fn dimensions(decoder: &impl ImageDecoder) -> (usize, usize) {
    let (width, height) = decoder.dimensions();
    (width as usize, height as usize)
}

fn decode_with(mut decoder: impl ImageDecoder, format: ImageFormat) -> Result<RgbImage, DecodeError> {
    let (width, height) = dimensions(&decoder);
    check_size(width, height)?;
    decoder.set_limits(limits()).map_err(|error| format.damaged(error))?;
    let image = DynamicImage::from_decoder(decoder).map_err(|error| format.damaged(error))?;
    let data = match image.color().has_alpha() {
        true => on_white(image.into_rgba8().as_raw()),
        false => image.into_rgb8().into_raw(),
    };
    Ok(RgbImage { width, height, data })
}

/// Lays RGBA pixels on a white ground.
fn on_white(rgba: &[u8]) -> Vec<u8> {
    let (pixels, _) = rgba.as_chunks::<4>();
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    pixels.iter().flat_map(|&[red, green, blue, alpha]| [red, green, blue].map(|colour| blend(colour, alpha))).collect()
}
