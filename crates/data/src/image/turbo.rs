//! JPEGs as libjpeg-turbo decodes them, to the bit, and with it Pillow; whole, or at a half, a quarter or an eighth of their sides, where each
//! block's inverse transform is taken over fewer coefficients.

use std::panic::catch_unwind;

use libjpeg_turbo_rs::{DecodeLimits, Decoder, PixelFormat, ScalingFactor};

use super::{MAX_PIXELS, MAX_SIDE, RgbImage, Scale};

/// The coefficients of a progressive JPEG are 16 bits each and all in memory, as are the planes and the image.
const MAX_MEMORY: u64 = 16 * MAX_PIXELS as u64;
/// Each scan of a progressive JPEG is a pass over all coefficients, however short it is; encoders write about ten.
const MAX_SCANS: usize = 100;

/// The image of a JPEG with `sides`, as its header says, at `scale`; `None` where this decoder finds anything to object to.
pub(super) fn decode_turbo(bytes: &[u8], scale: Scale, sides: (usize, usize)) -> Option<RgbImage> {
    // Young code: should it panic, the second decoder has its turn like after any other objection.
    catch_unwind(|| decode(bytes, scale, sides)).ok().flatten()
}

fn decode(bytes: &[u8], scale: Scale, (width, height): (usize, usize)) -> Option<RgbImage> {
    let limits = DecodeLimits {
        max_width: MAX_SIDE,
        max_height: MAX_SIDE,
        max_pixels: MAX_PIXELS as u64,
        max_scans: MAX_SCANS,
        max_memory: Some(MAX_MEMORY),
    };
    let mut decoder = Decoder::new_with_limits(bytes, limits).ok()?;
    decoder.set_output_format(PixelFormat::Rgb);
    decoder.set_stop_on_warning(true);
    // Where the last scans of a progressive JPEG are missing, as libjpeg does.
    decoder.set_block_smoothing(true);
    if scale != Scale::Full {
        decoder.set_scale(ScalingFactor::try_new(1, scale.divisor() as u32).ok()?);
    }
    let image = decoder.decode_image().ok()?;
    let expected = [width, height].map(|side| side.div_ceil(scale.divisor()));
    let fits = [image.width, image.height] == expected && image.data.len() == 3 * image.width * image.height;
    fits.then_some(RgbImage { width: image.width, height: image.height, data: image.data })
}
