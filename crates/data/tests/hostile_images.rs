//! Images as the web has them: each is decoded to what it shows, or refused in one line; none brings the program down.

mod fixture;

use blip2_data::image::{ImageFormat, inspect};
use blip2_data::{DecodeError, Filter, decode, evaluate_transform, train_transform};
use fixture::{encode, encode_jpeg, gradient, jpeg};
use image::{DynamicImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba};
use jpeg_encoder::ColorType;
use proptest::prelude::*;

fn png_of(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// The colour of an image that has one.
fn colour(bytes: &[u8]) -> [u8; 3] {
    let image = decode(bytes).unwrap();
    let (pixels, rest) = image.data.as_chunks::<3>();
    assert_eq!((pixels.len(), rest.len()), (image.width * image.height, 0));
    let near = |pixel: &[u8; 3]| pixel.iter().zip(pixels[0]).all(|(a, b)| a.abs_diff(b) <= 2);
    assert!(pixels.iter().all(near), "{pixels:?}");
    pixels[0]
}

fn assert_near(found: [u8; 3], expected: [u8; 3]) {
    assert!(found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 3), "{found:?}, expected {expected:?}");
}

#[test]
fn the_three_formats_show_the_same_picture() {
    let picture = gradient(37, 23);
    for (bytes, format, tolerance) in [
        (encode(&picture, image::ImageFormat::Png), ImageFormat::Png, 0),
        (encode(&picture, image::ImageFormat::WebP), ImageFormat::WebP, 0),
        (encode_jpeg(&picture, (37, 23), ColorType::Rgb, false), ImageFormat::Jpeg, 24),
        (encode_jpeg(&picture, (37, 23), ColorType::Rgb, true), ImageFormat::Jpeg, 24),
    ] {
        assert_eq!(inspect(&bytes).unwrap(), (format, 37, 23));
        let image = decode(&bytes).unwrap();
        assert_eq!((image.width, image.height), (37, 23));
        let worst = image.data.iter().zip(picture.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= tolerance, "{format:?}: {worst}");
    }
}

#[test]
fn grey_jpeg() {
    assert_near(colour(&encode_jpeg(&[77; 20 * 10], (20, 10), ColorType::Luma, false)), [77; 3]);
}

#[test]
fn cmyk_jpeg() {
    let ink = [10u8, 200, 60, 40].repeat(17 * 9);
    // Each channel is what its ink and the black ink let through.
    let expected = [10u32, 200, 60].map(|ink| ((255 - ink) * (255 - 40) / 255) as u8);
    for kind in [ColorType::Cmyk, ColorType::CmykAsYcck] {
        assert_near(colour(&encode_jpeg(&ink, (17, 9), kind, false)), expected);
    }
}

#[test]
fn grey_and_sixteen_bit_png() {
    let grey = ImageBuffer::from_pixel(3, 2, Luma([99u8]));
    assert_eq!(colour(&png_of(grey)), [99; 3]);
    let deep = ImageBuffer::from_pixel(3, 2, Rgb([257u16 * 12, 65535, 257 * 200 + 100]));
    assert_eq!(colour(&png_of(deep)), [12, 255, 200]);
    let deep_grey = ImageBuffer::from_pixel(3, 2, LumaA([0u16, 65535]));
    assert_eq!(colour(&png_of(deep_grey)), [0; 3]);
}

#[test]
fn transparent_pixels_are_laid_on_white() {
    let clear = ImageBuffer::from_pixel(3, 2, Rgba([10u8, 20, 30, 0]));
    assert_eq!(colour(&png_of(clear)), [255; 3]);
    let half = ImageBuffer::from_pixel(3, 2, Rgba([0u8, 100, 255, 128]));
    assert_eq!(colour(&png_of(half)), [127, 177, 255]);
    let webp = DynamicImage::from(ImageBuffer::from_pixel(4, 4, Rgba([200u8, 0, 0, 0])));
    let mut bytes = std::io::Cursor::new(Vec::new());
    webp.write_to(&mut bytes, image::ImageFormat::WebP).unwrap();
    assert_eq!(colour(bytes.get_ref()), [255; 3]);
}

fn u24(value: u32) -> [u8; 3] {
    let [a, b, c, _] = value.to_le_bytes();
    [a, b, c]
}

fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut chunk = [name.as_slice(), &(data.len() as u32).to_le_bytes(), data].concat();
    chunk.resize(chunk.len().next_multiple_of(2), 0);
    chunk
}

/// An animated WebP on a canvas of `width` x `height`, a frame for each image.
fn animation(width: u32, height: u32, frames: &[RgbImage]) -> Vec<u8> {
    let mut body = b"WEBP".to_vec();
    body.extend(chunk(b"VP8X", &[&[2u8, 0, 0, 0][..], &u24(width - 1), &u24(height - 1)].concat()));
    body.extend(chunk(b"ANIM", &[0; 6]));
    for frame in frames {
        let still = encode(frame, image::ImageFormat::WebP);
        let (frame_width, frame_height) = (u24(frame.width() - 1), u24(frame.height() - 1));
        let head = [&[0; 6][..], &frame_width, &frame_height, &u24(100), &[0]].concat();
        body.extend(chunk(b"ANMF", &[&head, &still[12..]].concat()));
    }
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

#[test]
fn an_animation_is_its_first_frame() {
    let frame = |colour| RgbImage::from_pixel(6, 4, Rgb(colour));
    let bytes = animation(6, 4, &[frame([250, 10, 20]), frame([0, 0, 255])]);
    assert_near(colour(&bytes), [250, 10, 20]);
}

#[test]
fn one_pixel() {
    let dot = RgbImage::from_pixel(1, 1, Rgb([9, 80, 200]));
    for bytes in [
        encode(&dot, image::ImageFormat::Png),
        encode(&dot, image::ImageFormat::WebP),
        encode_jpeg(&dot, (1, 1), ColorType::Rgb, false),
    ] {
        assert_near(colour(&bytes), [9, 80, 200]);
        let image = decode(&bytes).unwrap();
        for planes in
            [evaluate_transform(&image, 5, Filter::Bicubic), train_transform(&image, 5, Filter::Lanczos, 1, 2)]
        {
            assert_eq!(planes.len(), 75);
            assert!(planes[..25].iter().all(|&red| red == image.data[0]));
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn a_header_that_claims_100000_by_100000_pixels() {
    let mut png = encode(&gradient(8, 8), image::ImageFormat::Png);
    png[16..20].copy_from_slice(&100_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&100_000u32.to_be_bytes());
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    let claimed = |side| DecodeError::TooLarge { width: side, height: side };
    assert_eq!(decode(&png).unwrap_err(), claimed(100_000));
    assert_eq!(inspect(&png).unwrap_err(), claimed(100_000));
    // The WebP decoder itself refuses canvases of 2^32 pixels or more.
    let webp = |side| animation(side, side, &[gradient(8, 8)]);
    assert!(decode(&webp(100_000)).unwrap_err().to_string().contains("too large"));
    assert_eq!(decode(&webp(20_000)).unwrap_err(), claimed(20_000));
    assert_eq!(inspect(&webp(20_000)).unwrap_err(), claimed(20_000));
}

#[test]
fn a_jpeg_header_that_claims_more_than_is_decoded() {
    let good = jpeg(&gradient(8, 8));
    let frame = good.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
    for (width, height) in [(65_000u16, 65_000u16), (16_385, 1), (12_000, 12_000)] {
        let mut bytes = good.clone();
        bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
        bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error, DecodeError::TooLarge { width: width.into(), height: height.into() });
        assert!(error.to_string().contains(&format!("claims {width} x {height} pixels")));
    }
}

#[test]
fn a_jpeg_without_pixels() {
    let mut bytes = jpeg(&gradient(8, 8));
    let frame = bytes.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
    bytes[frame + 5..frame + 9].fill(0);
    assert!(decode(&bytes).is_err());
}

#[test]
fn an_image_that_is_cut_is_refused() {
    let picture = gradient(64, 48);
    for bytes in [
        encode(&picture, image::ImageFormat::Png),
        encode(&picture, image::ImageFormat::WebP),
        encode_jpeg(&picture, (64, 48), ColorType::Rgb, false),
        encode_jpeg(&picture, (64, 48), ColorType::Rgb, true),
    ] {
        assert!(decode(&bytes).is_ok());
        for cut in (0..bytes.len() * 9 / 10).step_by(7) {
            assert!(decode(&bytes[..cut]).is_err(), "{} of {} bytes", cut, bytes.len());
        }
    }
}

#[test]
fn what_is_no_image_is_named() {
    assert_eq!(decode(b"").unwrap_err(), DecodeError::Empty);
    for bytes in [b"GIF89a..".as_slice(), b"<html>", b"\xFF"] {
        let error = decode(bytes).unwrap_err();
        assert!(matches!(error, DecodeError::UnknownFormat(_)), "{error}");
        assert!(error.to_string().starts_with("neither JPEG, PNG nor WebP"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Decoded or refused, never a panic and never an image of another size than its header says.
    #[test]
    fn damaged_bytes(format in 0usize..4, damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let picture = gradient(24, 18);
        let mut bytes = match format {
            0 => encode(&picture, image::ImageFormat::Png),
            1 => encode(&picture, image::ImageFormat::WebP),
            2 => encode_jpeg(&picture, (24, 18), ColorType::Rgb, false),
            _ => encode_jpeg(&picture, (24, 18), ColorType::Rgb, true),
        };
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(image) = decode(&bytes) {
            prop_assert_eq!(image.data.len(), image.width * image.height * 3);
        }
    }
}
