//! JPEGs: Pillow's pixels, at the scale that the law of quality allows, and nothing lost where a decoder objects.

mod fixture;

use std::path::Path;

use blip2_data::image::{Frame, Picture, Scale, fit};
use blip2_data::{Filter, JpegSize, decode, train_transform};
use fixture::{encode, encode_jpeg};
use image::{Rgb, RgbImage};
use jpeg_encoder::ColorType;
use proptest::prelude::*;

const KINDS: [&str; 7] =
    ["baseline_420", "baseline_422", "baseline_444", "grey", "progressive_420", "progressive_first_scan", "restarts"];

/// Made by scripts/fixtures/jpegs.py.
#[test]
fn pixels_are_pillows_to_the_bit() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/jpegs");
    let read = |name: String| std::fs::read(folder.join(name)).unwrap();
    for kind in KINDS {
        let bytes = read(format!("{kind}.jpg"));
        for (scale, expected) in [(Scale::Full, format!("{kind}.png")), (Scale::Half, format!("{kind}_half.png"))] {
            let (image, found) = decoded(&bytes, scale);
            assert!(found == scale && image == decode(&read(expected)).unwrap(), "{kind} at {scale:?}");
        }
    }
}

/// Smooth waves with some grain, as a photograph has.
fn photograph(width: u32, height: u32) -> RgbImage {
    let mut state = 1u32;
    RgbImage::from_fn(width, height, |x, y| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (x, y, grain) = (x as f32, y as f32, (state >> 28) as f32);
        let wave = |period: f32| ((x / period).sin() + (y / (period * 0.7)).cos()) * 40.0;
        Rgb([wave(29.0), wave(53.0), wave(97.0)].map(|value| (120.0 + value + grain) as u8))
    })
}

fn decoded(bytes: &[u8], scale: Scale) -> (blip2_data::RgbImage, Scale) {
    Picture::open(bytes, JpegSize::Reduced).unwrap().decode(scale).unwrap()
}

#[test]
fn a_jpeg_has_its_sides_at_every_scale_rounded_up() {
    let picture = photograph(93, 70);
    for (colour, data) in [(ColorType::Rgb, picture.to_vec()), (ColorType::Luma, picture.as_raw()[..93 * 70].to_vec())]
    {
        for progressive in [false, true] {
            let bytes = encode_jpeg(&data, (93, 70), colour, progressive);
            for (scale, sides) in Scale::REDUCED.into_iter().zip([(47, 35), (24, 18), (12, 9)]) {
                let (image, found) = decoded(&bytes, scale);
                assert_eq!((found, image.width, image.height), (scale, sides.0, sides.1));
            }
        }
    }
}

#[test]
fn a_reduced_photograph_shows_what_the_whole_shows() {
    let bytes = encode_jpeg(&photograph(512, 384), (512, 384), ColorType::Rgb, false);
    let whole = decode(&bytes).unwrap();
    for position in 0..20 {
        let frame = Frame::crop_flip(512, 384, 3, position);
        let expected = train_transform(&whole, 32, Filter::Bicubic, 3, position);
        let scale = frame.scale(32);
        let (image, found) = decoded(&bytes, scale);
        assert!(found == scale && scale != Scale::Full);
        let got = frame.pixels(&image, scale, 32, Filter::Bicubic);
        let worst = got.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!((1..=8).contains(&worst), "{worst} at {scale:?}");
    }
}

#[test]
fn what_is_cut_or_cannot_be_reduced_is_decoded_or_refused_as_ever() {
    let bytes = encode_jpeg(&photograph(128, 96), (128, 96), ColorType::Rgb, false);
    for cut in (0..bytes.len() * 9 / 10).step_by(97) {
        let Ok(mut picture) = Picture::open(&bytes[..cut], JpegSize::Reduced) else { continue };
        assert_eq!(picture.decode(Scale::Half).unwrap_err(), decode(&bytes[..cut]).unwrap_err());
    }
    let png = encode(&photograph(128, 96), image::ImageFormat::Png);
    let mut picture = Picture::open(&png, JpegSize::Reduced).unwrap();
    assert_eq!(picture.scale(&Frame::whole(128, 96), 8), Scale::Full);
    assert_eq!(picture.decode(Scale::Quarter).unwrap(), (decode(&png).unwrap(), Scale::Full));
    let whole = Picture::open(&bytes, JpegSize::Full).unwrap();
    assert_eq!(whole.scale(&Frame::whole(128, 96), 8), Scale::Full);
}

#[test]
fn inks_are_colours_at_every_scale() {
    let ink = [10u8, 200, 60, 40].repeat(64 * 48);
    for kind in [ColorType::Cmyk, ColorType::CmykAsYcck] {
        let bytes = encode_jpeg(&ink, (64, 48), kind, false);
        let whole = decode(&bytes).unwrap();
        for scale in [Scale::Full, Scale::Half] {
            let (image, found) = decoded(&bytes, scale);
            let near = |pixel: &[u8]| pixel.iter().zip(&whole.data[..3]).all(|(a, b)| a.abs_diff(*b) <= 3);
            assert!(found == scale && image.data.chunks(3).all(near), "{kind:?} at {scale:?}");
        }
    }
}

#[test]
fn a_small_copy_is_near_to_a_filtered_one() {
    let bytes = encode_jpeg(&photograph(256, 192), (256, 192), ColorType::Rgb, false);
    let (image, _) = decoded(&bytes, Scale::Half);
    let filtered = fit(&decode(&bytes).unwrap(), 128, Filter::Box);
    let sum: u64 = image.data.iter().zip(&filtered.data).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    assert!((sum as f64 / image.data.len() as f64) < 3.0, "{sum}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// The law of quality: as small as twice the square allows, and no smaller.
    #[test]
    fn a_crop_keeps_twice_the_square(width in 1usize..6000, height in 1usize..6000, size in 1usize..500, position: u64) {
        let frame = Frame::crop_flip(width, height, 7, position);
        let whole = Frame::whole(width, height);
        prop_assert_eq!(whole.scale(size) == Scale::Full, width.min(height) < 4 * size);
        // A part of an image is never decoded smaller than the whole would be.
        prop_assert!(frame.scale(size) <= whole.scale(size));
        let divisor = whole.scale(size).divisor();
        prop_assert!(divisor == 1 || width.min(height) >= 2 * size * divisor);
        prop_assert!(divisor == 8 || width.min(height) < 4 * size * divisor);
    }

    /// Damaged as below, at every scale.
    #[test]
    fn damaged_jpegs(
        progressive: bool,
        scale in 0usize..3,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = encode_jpeg(&photograph(48, 40), (48, 40), ColorType::Rgb, progressive);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(mut picture) = Picture::open(&bytes, JpegSize::Reduced)
            && let Ok((image, scale)) = picture.decode(Scale::REDUCED[scale])
        {
            let sides = [picture.width, picture.height].map(|side| side.div_ceil(scale.divisor()));
            prop_assert_eq!([image.width, image.height], sides);
            prop_assert_eq!(image.data.len(), image.width * image.height * 3);
        }
    }
}
