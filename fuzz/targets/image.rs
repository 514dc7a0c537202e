//! The image decoders: any bytes are an image of the size that their header says, or refused in one line.
#![no_main]

use blip2_data::image::{Picture, Scale, inspect};
use blip2_data::{DecodeError, Filter, JpegSize, decode, train_transform};
use libfuzzer_sys::fuzz_target;

/// Larger images are the same code for longer.
const MAX_PIXELS: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let header = inspect(data);
    if header.as_ref().is_ok_and(|(_, width, height)| width * height > MAX_PIXELS) {
        return;
    }
    for scale in Scale::REDUCED {
        if let Ok(mut picture) = Picture::open(data, JpegSize::Reduced) {
            if let Ok((image, scale)) = picture.decode(scale) {
                let sides = [picture.width, picture.height].map(|side| side.div_ceil(scale.divisor()));
                assert_eq!([image.width, image.height], sides);
                assert_eq!(image.data.len(), image.width * image.height * 3);
            }
        }
    }
    match decode(data) {
        Ok(image) => {
            assert_eq!(image.data.len(), image.width * image.height * 3);
            let (_, width, height) = header.expect("what can be decoded has a header");
            assert_eq!((image.width, image.height), (width, height));
            let position = data.iter().fold(0, |sum: u64, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
            assert_eq!(train_transform(&image, 16, Filter::Bicubic, 1, position).len(), 3 * 16 * 16);
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{error}");
            let too_large = matches!(error, DecodeError::TooLarge { .. } | DecodeError::NoPixels { .. });
            assert!(!too_large || header.is_err(), "{error}");
        }
    }
});
