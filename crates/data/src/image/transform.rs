//! BLIP-2's image transforms up to the normalisation, which happens on the device: `blip2_image_train` is a random
//! resized crop and a horizontal flip, `blip_image_eval` squeezes the image into the square. Both resize bicubically
//! with the kernel widened for shrinking, as PIL does.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::RgbImage;
use crate::keyed::{KeyedRng, key};

/// The part of the image's area that a crop covers.
const SCALE: (f64, f64) = (0.5, 1.0);
/// Width by height of a crop.
const RATIO: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);
const TRIES: usize = 10;
const FLIP_PROBABILITY: f64 = 0.5;
/// Sets the augmentation's numbers apart from those of the order.
const AUGMENT: u64 = 3;

/// What is done to a training image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Augment {
    /// The evaluation transform.
    None,
    /// Random resized crop and horizontal flip.
    CropFlip,
}

/// A part of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Crop {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

/// The whole image, squeezed into a square of `size` pixels.
///
/// # Shapes
/// Returns `[3, size, size]`.
pub fn evaluate_transform(image: &RgbImage, size: usize) -> Vec<u8> {
    let whole = Crop {
        left: 0,
        top: 0,
        width: image.width,
        height: image.height,
    };
    to_planes(&resize(image, whole, size), size, false)
}

/// A random crop of the image, resized to a square of `size` pixels and flipped half of the time. The numbers are
/// those of `position` in the stream of `seed`.
///
/// # Shapes
/// Returns `[3, size, size]`.
pub fn train_transform(image: &RgbImage, size: usize, seed: u64, position: u64) -> Vec<u8> {
    let mut rng = KeyedRng::new(key(seed, &[AUGMENT, position]));
    let crop = random_crop(image.width, image.height, &mut rng);
    let flip = rng.unit() < FLIP_PROBABILITY;
    to_planes(&resize(image, crop, size), size, flip)
}

/// torchvision's `RandomResizedCrop.get_params`.
fn random_crop(width: usize, height: usize, rng: &mut KeyedRng) -> Crop {
    let area = (width * height) as f64;
    for _ in 0..TRIES {
        let target = area * rng.uniform(SCALE.0, SCALE.1);
        let ratio = rng.uniform(RATIO.0.ln(), RATIO.1.ln()).exp();
        let w = (target * ratio).sqrt().round_ties_even() as usize;
        let h = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = rng.below((height - h + 1) as u32) as usize;
            let left = rng.below((width - w + 1) as u32) as usize;
            return Crop {
                left,
                top,
                width: w,
                height: h,
            };
        }
    }
    let ratio = width as f64 / height as f64;
    let (w, h) = if ratio < RATIO.0 {
        (width, (width as f64 / RATIO.0).round_ties_even() as usize)
    } else if ratio > RATIO.1 {
        ((height as f64 * RATIO.1).round_ties_even() as usize, height)
    } else {
        (width, height)
    };
    Crop {
        left: (width - w) / 2,
        top: (height - h) / 2,
        width: w,
        height: h,
    }
}

/// `[size, size, 3]`
fn resize(image: &RgbImage, crop: Crop, size: usize) -> Vec<u8> {
    let mut resized = Image::new(size as u32, size as u32, PixelType::U8x3);
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom))
        .crop(
            crop.left as f64,
            crop.top as f64,
            crop.width as f64,
            crop.height as f64,
        );
    let source = ImageRef::new(
        image.width as u32,
        image.height as u32,
        &image.data,
        PixelType::U8x3,
    );
    let source = source.expect("an RgbImage holds three bytes a pixel");
    Resizer::new()
        .resize(&source, &mut resized, &options)
        .expect("both images are U8x3 and the crop lies inside");
    resized.into_vec()
}

/// `[size, size, 3]` to `[3, size, size]`, each row reversed when `flip`.
fn to_planes(interleaved: &[u8], size: usize, flip: bool) -> Vec<u8> {
    let mut planes = vec![0; interleaved.len()];
    let (pixels, _) = interleaved.as_chunks::<3>();
    for (at, pixel) in pixels.iter().enumerate() {
        let (row, column) = (at / size, at % size);
        let column = if flip { size - 1 - column } else { column };
        for (channel, value) in pixel.iter().enumerate() {
            planes[(channel * size + row) * size + column] = *value;
        }
    }
    planes
}
