//! From an image file to the pixels of a batch: decode, crop, resize, flip; and back to files.

mod decode;
mod encode;
mod scale;
mod transform;
mod turbo;

pub use decode::{DecodeError, ImageFormat, MAX_PIXELS, MAX_SIDE, decode, inspect};
pub use encode::{EncodeError, encode_jpeg, encode_png};
pub use scale::{JpegSize, Picture, Scale};
pub use transform::{Augment, Filter, Frame, evaluate_transform, fit, train_transform};

/// Raised whenever decoding or a transform gives other pixels for the same image: features made from the old ones are not used any more.
pub(crate) const PIXELS_VERSION: u32 = 2;

/// An image in memory. `data` holds three bytes for each of the `width` times `height` pixels, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, 3]`, red first.
    pub data: Vec<u8>,
}
