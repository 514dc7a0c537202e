//! At which size a picture is decoded that becomes a small square: whole, or, for JPEGs, at a fraction of its sides.

use super::decode::decode_inspected;
use super::turbo::decode_turbo;
use super::{DecodeError, Frame, ImageFormat, RgbImage, inspect};

/// The size at which JPEGs are decoded for training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JpegSize {
    /// Whole.
    Full,
    /// At the smallest [`Scale`] that the crop allows.
    Reduced,
}

impl JpegSize {
    /// Every choice.
    pub const ALL: [JpegSize; 2] = [JpegSize::Full, JpegSize::Reduced];

    /// The word for it in files.
    pub fn as_str(self) -> &'static str {
        match self {
            JpegSize::Full => "full",
            JpegSize::Reduced => "reduced",
        }
    }
}

/// A fraction of an image's sides at which a JPEG can be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scale {
    /// All of them.
    Full,
    /// 1/2.
    Half,
    /// 1/4.
    Quarter,
    /// 1/8.
    Eighth,
}

impl Scale {
    /// The fractions, the largest first.
    pub const REDUCED: [Scale; 3] = [Scale::Half, Scale::Quarter, Scale::Eighth];

    /// What sides are divided by, and rounded up.
    pub fn divisor(self) -> usize {
        match self {
            Scale::Full => 1,
            Scale::Half => 2,
            Scale::Quarter => 4,
            Scale::Eighth => 8,
        }
    }
}

/// An image file whose header was read, to be decoded for the frames that are wanted of it.
#[derive(Debug)]
pub struct Picture<'b> {
    bytes: &'b [u8],
    format: ImageFormat,
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    reducible: bool,
}

impl<'b> Picture<'b> {
    /// Reads the header.
    ///
    /// # Errors
    /// As [`inspect`].
    pub fn open(bytes: &'b [u8], jpegs: JpegSize) -> Result<Picture<'b>, DecodeError> {
        let (format, width, height) = inspect(bytes)?;
        Ok(Picture {
            bytes,
            format,
            width,
            height,
            reducible: format == ImageFormat::Jpeg && jpegs == JpegSize::Reduced,
        })
    }

    /// The scale at which it is decoded for a square of `size` pixels of `frame`.
    pub fn scale(&self, frame: &Frame, size: usize) -> Scale {
        if self.reducible { frame.scale(size) } else { Scale::Full }
    }

    /// The image, with the scale that it has. A JPEG that cannot be reduced is decoded whole, now and for the frames that follow, or refused
    /// with what is wrong with it.
    ///
    /// # Errors
    /// As [`decode`](super::decode).
    pub fn decode(&mut self, scale: Scale) -> Result<(RgbImage, Scale), DecodeError> {
        let sides = (self.width, self.height);
        if self.reducible && scale != Scale::Full {
            if let Some(image) = decode_turbo(self.bytes, scale, sides) {
                return Ok((image, scale));
            }
            self.reducible = false;
        }
        Ok((decode_inspected(self.bytes, self.format, sides)?, Scale::Full))
    }
}
