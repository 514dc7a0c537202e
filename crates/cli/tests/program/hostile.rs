//! Hostile shards in a run: what can be read is trained on, the rest is named in `quarantine.jsonl`, and the run goes on.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbImage};
use jpeg_encoder::{ColorType, Encoder};
use serde_json::json;

use crate::tiny_run::{TinyRun, assert_no_panic, json_lines, metrics, refused, train};

fn encoded(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(side: u32, shade: u8) -> Vec<u8> {
    encoded(RgbImage::from_pixel(side, side, Rgb([shade, 255 - shade, 90])), ImageFormat::Png)
}

fn jpeg(data: &[u8], colour: ColorType) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::new(&mut bytes, 90).encode(data, 20, 20, colour).unwrap();
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// A small PNG whose header claims 100,000 x 100,000 pixels.
fn huge() -> Vec<u8> {
    let mut bytes = png(8, 0);
    for side in [16, 20] {
        bytes[side..side + 4].copy_from_slice(&100_000u32.to_be_bytes());
    }
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// A WebP of two frames of 6 x 4 pixels.
fn animation() -> Vec<u8> {
    let chunk = |name: &[u8; 4], data: &[u8]| [name, &(data.len() as u32).to_le_bytes()[..], data].concat();
    let mut body =
        [b"WEBP".to_vec(), chunk(b"VP8X", &[2, 0, 0, 0, 5, 0, 0, 3, 0, 0]), chunk(b"ANIM", &[0; 6])].concat();
    for shade in [10, 200] {
        let still = encoded(RgbImage::from_pixel(6, 4, Rgb([shade; 3])), ImageFormat::WebP);
        let head = [0, 0, 0, 0, 0, 0, 5, 0, 0, 3, 0, 0, 100, 0, 0, 0];
        body.extend(chunk(b"ANMF", &[&head, &still[12..]].concat()));
    }
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

fn tar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, data.as_slice()).unwrap();
    }
    archive.into_inner().unwrap()
}

fn caption() -> Vec<u8> {
    b"t11 t22 t33".to_vec()
}

#[test]
fn a_run_over_all_that_can_be_wrong_with_a_sample() {
    let tiny = TinyRun::new();
    let deep = ImageBuffer::from_pixel(9, 9, Rgb([65_535u16, 300, 9]));
    let readable = [
        ("dot.png", png(1, 7)),
        ("cmyk.jpg", jpeg(&[10, 200, 60, 40].repeat(400), ColorType::Cmyk)),
        ("grey.jpg", jpeg(&[77; 400], ColorType::Luma)),
        ("greypng.png", encoded(ImageBuffer::from_pixel(9, 9, Luma([99u8])), ImageFormat::Png)),
        ("deep.png", encoded(deep, ImageFormat::Png)),
        ("animated.webp", animation()),
    ];
    let broken = [("corrupt.png", png(30, 1)[..60].to_vec()), ("huge.png", huge()), ("text.jpg", b"no image".to_vec())];
    let mut members = Vec::new();
    for (name, image) in readable.into_iter().chain(broken) {
        let key = name.split_once('.').unwrap().0;
        members.extend([(name.to_owned(), image), (format!("{key}.txt"), caption())]);
    }
    for (key, text) in [("blank", b" \n".to_vec()), ("latin", b"caf\xe9".to_vec())] {
        members.extend([(format!("{key}.png"), png(9, 9)), (format!("{key}.txt"), text)]);
    }
    members.extend([("mute.png".into(), png(9, 9)), ("blind.txt".into(), caption())]);
    let members: Vec<(&str, Vec<u8>)> = members.iter().map(|(name, data)| (name.as_str(), data.clone())).collect();
    fs::write(tiny.path("shards/hostile.tar"), tar(&members)).unwrap();
    let cut = tar(&[("a.png", png(9, 3)), ("a.txt", caption()), ("b.png", png(9, 4)), ("b.txt", caption())]);
    fs::write(tiny.path("shards/cut.tar"), &cut[..cut.len() - 1024 - 510]).unwrap();

    // With features from memory, too, where the run learns of a bad picture before its first step.
    for (name, augment, cache) in [("decoded", "crop_flip", "off"), ("cached", "none", "memory")] {
        // Twenty good samples an epoch at most: all have been drawn after so many steps.
        let changes = [
            ("/schedule/steps", json!(8)),
            ("/eval/every", json!(8)),
            ("/data/image/augment", json!(augment)),
            ("/data/feature_cache", json!(cache)),
            ("/data/loader/max_bad_fraction", json!(0.5)),
        ];
        let ended = train(&tiny.stage1(name, &changes), &[]);
        assert_no_panic(&ended.stderr);
        ended.success();
        check_run(&tiny.run(name));
    }
}

fn check_run(run: &Path) {
    assert_eq!(metrics(run).iter().filter(|record| record.get("loss").is_some()).count(), 8);
    assert!(metrics(run).iter().any(|record| record.get("val_loss").is_some()));
    let quarantined: BTreeMap<String, String> = json_lines(&run.join("quarantine.jsonl"))
        .iter()
        .map(|line| ["key", "reason"].map(|name| line[name].as_str().unwrap().to_owned()).into())
        .collect();
    let expected = [
        ("", "inside member b.txt"),
        ("b", "no caption"),
        ("blank", "caption is empty"),
        ("blind", "no image"),
        ("corrupt", "image: "),
        ("huge", "100000 x 100000"),
        ("latin", "not UTF-8"),
        ("mute", "no caption"),
        ("text", "neither JPEG, PNG nor WebP"),
    ];
    assert!(quarantined.keys().eq(expected.iter().map(|(key, _)| *key)), "{quarantined:#?}");
    for (key, reason) in expected {
        assert!(quarantined[key].contains(reason), "{key}: {}", quarantined[key]);
    }
}

#[test]
fn shards_that_hold_nothing() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &[]);
    let shard = tiny.path("shards/zero.tar");
    fs::write(&shard, "").unwrap();
    let message = refused(train(&config, &[]));
    assert!(message.contains("zero.tar has zero bytes; fetch it again"), "{message}");

    // The same command with the shard fetched again.
    fs::write(&shard, tar(&[("a.png", png(9, 3)), ("a.txt", caption())])).unwrap();
    train(&config, &[]).success();
}

#[test]
fn a_validation_set_without_a_usable_sample() {
    let tiny = TinyRun::new();
    fs::create_dir(tiny.path("val")).unwrap();
    let shard = tiny.path("val/0.tar");
    let config = tiny.stage1("a", &[("/data/val/shards", json!(shard))]);
    fs::write(&shard, tar(&[("a.png", png(9, 3))])).unwrap();
    let message = refused(train(&config, &[]));
    assert!(message.contains("data.val") && message.contains("no usable sample in 1 shards"), "{message}");
    fs::write(&shard, tar(&[("a.png", b"no image".to_vec()), ("a.txt", caption())])).unwrap();
    let ended = train(&config, &[]);
    assert!(!ended.stderr.contains("loading models"), "{}", ended.stderr);
    let message = refused(ended);
    assert!(message.contains("data.val") && message.contains("neither JPEG, PNG nor WebP"), "{message}");

    // One sample is few, but a set.
    fs::write(&shard, tar(&[("a.png", png(9, 3)), ("a.txt", caption())])).unwrap();
    train(&config, &[]).success();
}
