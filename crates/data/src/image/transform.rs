//! BLIP-2's image transforms up to the normalisation, which happens on the device: `blip2_image_train` is a random
//! resized crop and a horizontal flip, `blip_image_eval` squeezes the image into the square. Both resize with the image
//! encoder's filter (BLIP-2's is bicubic), its kernel widened for shrinking, as PIL does.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use super::{RgbImage, Scale};
use crate::keyed::{KeyedRng, key};

/// The part of the image's area that a crop covers.
const SCALE: (f64, f64) = (0.5, 1.0);
/// Width by height of a crop.
const RATIO: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);
const TRIES: usize = 10;
const FLIP_PROBABILITY: f64 = 0.5;
/// So many times the square's side are left to the resizing filter where an image is decoded at a fraction of its size: with less, its
/// pixels would show it (tens of levels at 1.2 times).
const KEPT_SIDES: usize = 2;
/// Sets the augmentation's numbers apart from those of the order.
const AUGMENT: u64 = 3;

/// How pixels are interpolated: Pillow's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Three lobes of a windowed sinc.
    Lanczos,
    /// Linear.
    Bilinear,
    /// Cubic with a = -1/2 (Catmull-Rom).
    Bicubic,
    /// The mean of the pixels that are covered.
    Box,
    /// Linear with Hamming's window.
    Hamming,
}

impl Filter {
    const BY_NUMBER: [Filter; 6] =
        [Filter::Nearest, Filter::Lanczos, Filter::Bilinear, Filter::Bicubic, Filter::Box, Filter::Hamming];

    /// The filter with Pillow's number, as `resample` in a `preprocessor_config.json` gives it; `None` if there is none.
    pub fn from_pillow(number: u64) -> Option<Filter> {
        Self::BY_NUMBER.get(usize::try_from(number).ok()?).copied()
    }

    /// Pillow's number of it.
    pub fn pillow(self) -> u8 {
        self as u8
    }

    fn algorithm(self) -> ResizeAlg {
        match self {
            Filter::Nearest => ResizeAlg::Nearest,
            Filter::Lanczos => ResizeAlg::Convolution(FilterType::Lanczos3),
            Filter::Bilinear => ResizeAlg::Convolution(FilterType::Bilinear),
            Filter::Bicubic => ResizeAlg::Convolution(FilterType::CatmullRom),
            Filter::Box => ResizeAlg::Convolution(FilterType::Box),
            Filter::Hamming => ResizeAlg::Convolution(FilterType::Hamming),
        }
    }
}

/// What is done to a training image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Augment {
    /// The evaluation transform.
    None,
    /// Random resized crop and horizontal flip (BLIP-2, section 3.4).
    CropFlip,
}

impl Augment {
    /// Every choice.
    pub const ALL: [Augment; 2] = [Augment::CropFlip, Augment::None];

    /// The word for it in files.
    pub fn as_str(self) -> &'static str {
        match self {
            Augment::CropFlip => "crop_flip",
            Augment::None => "none",
        }
    }
}

/// A part of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Crop {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

/// What of an image becomes the square: known from its sides, before it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    crop: Crop,
    flip: bool,
}

impl Frame {
    /// The whole image.
    pub fn whole(width: usize, height: usize) -> Frame {
        Frame { crop: Crop { left: 0, top: 0, width, height }, flip: false }
    }

    /// A random crop, flipped half of the time. The numbers are those of `position` in the stream of `seed`.
    pub fn crop_flip(width: usize, height: usize, seed: u64, position: u64) -> Frame {
        let mut rng = KeyedRng::new(key(seed, &[AUGMENT, position]));
        let crop = random_crop(width, height, &mut rng);
        Frame { crop, flip: rng.unit() < FLIP_PROBABILITY }
    }

    /// The smallest scale at which this part still has twice `size` pixels a side.
    pub fn scale(&self, size: usize) -> Scale {
        let side = self.crop.width.min(self.crop.height);
        let enough = |scale: &Scale| side >= KEPT_SIDES * size * scale.divisor();
        Scale::REDUCED.into_iter().rev().find(enough).unwrap_or(Scale::Full)
    }

    /// The square's pixels, from the image as decoded at `scale`.
    ///
    /// # Shapes
    /// Returns `[3, size, size]`.
    ///
    /// # Panics
    /// When `size` is zero, the image does not hold what its sides say, or this part does not lie inside.
    pub fn pixels(&self, image: &RgbImage, scale: Scale, size: usize, filter: Filter) -> Vec<u8> {
        to_planes(&resize(image, self.crop, scale, (size, size), filter), size, self.flip)
    }
}

/// The whole image, squeezed into a square of `size` pixels.
///
/// # Shapes
/// Returns `[3, size, size]`.
///
/// # Panics
/// When `size` is zero or the image does not hold what its sides say.
pub fn evaluate_transform(image: &RgbImage, size: usize, filter: Filter) -> Vec<u8> {
    Frame::whole(image.width, image.height).pixels(image, Scale::Full, size, filter)
}

/// The image with its longer side brought to `longest_side` pixels, its shape kept.
///
/// # Panics
/// When `longest_side` is zero or the image does not hold what its sides say.
pub fn fit(image: &RgbImage, longest_side: usize, filter: Filter) -> RgbImage {
    let longest = image.width.max(image.height);
    // Rounded half up, and never to nothing.
    let scaled = |side: usize| ((side * longest_side * 2 + longest) / (2 * longest)).max(1);
    let (width, height) = (scaled(image.width), scaled(image.height));
    let whole = Crop { left: 0, top: 0, width: image.width, height: image.height };
    RgbImage { width, height, data: resize(image, whole, Scale::Full, (width, height), filter) }
}

/// A random crop of the image, resized to a square of `size` pixels and flipped half of the time. The numbers are
/// those of `position` in the stream of `seed`.
///
/// # Shapes
/// Returns `[3, size, size]`.
///
/// # Panics
/// When `size` is zero or the image does not hold what its sides say.
pub fn train_transform(image: &RgbImage, size: usize, filter: Filter, seed: u64, position: u64) -> Vec<u8> {
    Frame::crop_flip(image.width, image.height, seed, position).pixels(image, Scale::Full, size, filter)
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
            return Crop { left, top, width: w, height: h };
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
    Crop { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
}

/// `[height, width, 3]` of an image that was decoded at `scale`; the crop is in pixels of the whole.
fn resize(image: &RgbImage, crop: Crop, scale: Scale, (width, height): (usize, usize), filter: Filter) -> Vec<u8> {
    let scaled = |pixels: usize| pixels as f64 / scale.divisor() as f64;
    let options = ResizeOptions::new().resize_alg(filter.algorithm()).crop(
        scaled(crop.left),
        scaled(crop.top),
        scaled(crop.width),
        scaled(crop.height),
    );
    // Typed: the general call would bring code for every pixel format into this crate.
    let mut resized = vec![0; 3 * width * height];
    let size = |side: usize| side as u32;
    let source = TypedImageRef::<U8x3>::from_buffer(size(image.width), size(image.height), &image.data);
    let source = source.expect("an RgbImage holds three bytes a pixel");
    let target = TypedImage::<U8x3>::from_buffer(size(width), size(height), &mut resized);
    let mut target = target.expect("three bytes were made for each pixel");
    Resizer::new().resize_typed(&source, &mut target, &options).expect("the crop lies inside");
    resized
}

/// `[size, size, 3]` to `[3, size, size]`, each row reversed when `flip`.
fn to_planes(interleaved: &[u8], size: usize, flip: bool) -> Vec<u8> {
    let mut planes = vec![0; interleaved.len()];
    let (pixels, _) = interleaved.as_chunks::<3>();
    for (channel, plane) in planes.chunks_exact_mut(size * size).enumerate() {
        for (row, line) in pixels.chunks_exact(size).zip(plane.chunks_exact_mut(size)) {
            let values = row.iter().map(|pixel| pixel[channel]);
            match flip {
                true => line.iter_mut().rev().zip(values).for_each(|(to, value)| *to = value),
                false => line.iter_mut().zip(values).for_each(|(to, value)| *to = value),
            }
        }
    }
    planes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize) -> RgbImage {
        let pixel = |x: usize, y: usize| [x * x * 7 + y * 13, x * 31 + y * y * 5, x * y * 17].map(|v| v as u8);
        let data = (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect();
        RgbImage { width, height, data }
    }

    #[test]
    fn resizes_as_pil_does() {
        // Pillow 13.0, Image.resize((4, 4), BICUBIC) of the picture above: red, green, blue.
        let shrunk: [u8; 48] = [
            26, 121, 132, 148, 56, 131, 149, 127, 86, 163, 113, 123, 118, 135, 98, 100, 40, 147, 170, 76, 82, 174, 85,
            119, 165, 123, 113, 160, 111, 141, 139, 97, 13, 58, 77, 95, 63, 154, 138, 137, 103, 158, 148, 166, 96, 137,
            126, 130,
        ];
        // The same with 3 x 2 pixels, enlarged to 5 x 5: red.
        let enlarged: [u8; 25] =
            [0, 1, 6, 20, 29, 1, 3, 8, 22, 31, 6, 9, 14, 28, 37, 11, 14, 19, 33, 42, 13, 16, 21, 35, 44];
        let near = |a: &[u8], b: &[u8]| a.iter().zip(b).all(|(a, b)| a.abs_diff(*b) <= 1);
        let squeezed = |picture, size| evaluate_transform(&picture, size, Filter::Bicubic);
        assert!(near(&squeezed(picture(13, 9), 4), &shrunk), "{:?}", squeezed(picture(13, 9), 4));
        assert!(near(&squeezed(picture(3, 2), 5)[..25], &enlarged));
    }

    #[test]
    fn every_filter_resizes_as_pillow_s_of_that_number() {
        // Pillow 13.0, Image.resize((4, 4), number) of the same picture: red.
        let pillow: [[u8; 16]; 6] = [
            [20, 125, 205, 92, 46, 151, 231, 118, 72, 177, 1, 144, 98, 203, 27, 170],
            [23, 122, 131, 147, 56, 125, 153, 131, 85, 166, 115, 122, 121, 138, 92, 98],
            [34, 118, 135, 143, 60, 130, 145, 127, 90, 155, 115, 123, 116, 135, 99, 104],
            [26, 121, 132, 148, 56, 131, 149, 127, 86, 163, 113, 123, 118, 135, 98, 100],
            [19, 126, 118, 176, 51, 126, 150, 123, 84, 159, 98, 113, 110, 121, 124, 96],
            [26, 128, 132, 150, 54, 143, 147, 124, 84, 171, 103, 130, 112, 129, 106, 106],
        ];
        for (number, expected) in pillow.iter().enumerate() {
            let filter = Filter::from_pillow(number as u64).unwrap();
            assert_eq!(usize::from(filter.pillow()), number);
            let red = &evaluate_transform(&picture(13, 9), 4, filter)[..16];
            assert!(red.iter().zip(expected).all(|(a, b)| a.abs_diff(*b) <= 1), "{filter:?}: {red:?}");
        }
        assert_eq!([6, u64::MAX].map(Filter::from_pillow), [None, None]);
    }

    #[test]
    fn an_image_of_the_right_size_stays_what_it_is() {
        let image = picture(6, 6);
        let planes = evaluate_transform(&image, 6, Filter::Bicubic);
        for (at, pixel) in image.data.chunks(3).enumerate() {
            assert_eq!(pixel, [planes[at], planes[36 + at], planes[72 + at]]);
        }
        let mirrored = to_planes(&image.data, 6, true);
        for row in 0..18 {
            let back: Vec<u8> = mirrored[row * 6..][..6].iter().rev().copied().collect();
            assert_eq!(back, planes[row * 6..][..6]);
        }
    }

    #[test]
    fn crops_lie_inside_and_keep_the_law() {
        let mut rng = KeyedRng::new(1);
        let (mut areas, mut corners) = (Vec::new(), Vec::new());
        for _ in 0..2000 {
            let crop = random_crop(640, 480, &mut rng);
            assert!(crop.left + crop.width <= 640 && crop.top + crop.height <= 480);
            let ratio = crop.width as f64 / crop.height as f64;
            assert!((0.745..1.34).contains(&ratio), "{crop:?}");
            areas.push((crop.width * crop.height) as f64 / (640.0 * 480.0));
            corners.push((crop.left, crop.top));
        }
        assert!(areas.iter().all(|area| (0.498..1.0).contains(area)));
        // Large crops of a narrow shape do not fit and are drawn again, so the mean lies below 0.75.
        let mean = areas.iter().sum::<f64>() / areas.len() as f64;
        assert!((0.6..0.75).contains(&mean), "{mean}");
        assert!(corners.iter().any(|&(left, top)| left > 100 && top > 50));
    }

    #[test]
    fn an_image_that_no_crop_fits_is_cropped_in_its_centre() {
        for (width, height, expected) in [
            (1, 1, (0, 0, 1, 1)),
            (1000, 10, (493, 0, 13, 10)),
            (10, 1000, (0, 493, 10, 13)),
            (1, 5000, (0, 2499, 1, 1)),
        ] {
            let crop = random_crop(width, height, &mut KeyedRng::new(3));
            assert_eq!((crop.left, crop.top, crop.width, crop.height), expected, "{width} x {height}");
        }
    }

    #[test]
    fn the_augmentation_of_a_position_never_changes() {
        let draw = |position| {
            let mut rng = KeyedRng::new(key(42, &[AUGMENT, position]));
            let crop = random_crop(640, 480, &mut rng);
            (crop.left, crop.top, crop.width, crop.height, rng.unit() < FLIP_PROBABILITY)
        };
        assert_eq!(
            [draw(0), draw(1), draw(1_000_000)],
            [(66, 38, 558, 442, true), (136, 14, 392, 456, false), (150, 39, 427, 364, true)]
        );
    }

    #[test]
    fn half_of_the_images_are_flipped() {
        // Dark on the left, bright on the right, in any crop.
        let data = (0..32).flat_map(|_| (0..32).flat_map(|x| [x as u8 * 8; 3])).collect();
        let image = RgbImage { width: 32, height: 32, data };
        let flipped = (0..1000).filter(|&position| {
            let planes = train_transform(&image, 8, Filter::Bicubic, 5, position);
            planes[0] > planes[7]
        });
        let flipped = flipped.count();
        assert!((440..560).contains(&flipped), "{flipped}");
    }
}
