//! One image's way, part by part: decode, crop and resize, caption.

#[path = "../tests/fixture/mod.rs"]
mod fixture;

use std::hint::black_box;

use blip2_data::{Clean, Filter, clean_caption, decode, evaluate_transform, train_transform};
use criterion::{Criterion, criterion_group, criterion_main};
use image::{Rgb, RgbImage};

/// Detail at all scales, with some noise, so that the JPEG is as long as a photograph's.
fn picture() -> RgbImage {
    let mut state = 1u32;
    RgbImage::from_fn(640, 480, |x, y| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (x, y, noise) = (x as f32, y as f32, (state >> 27) as f32);
        let wave = |period: f32| ((x / period).sin() + (y / (period * 0.7)).cos()) * 25.0;
        Rgb([wave(9.0), wave(31.0), wave(80.0)].map(|value| (120.0 + value + wave(3.0) * 0.3 + noise) as u8))
    })
}

fn image_path(criterion: &mut Criterion) {
    let jpeg = fixture::jpeg(&picture());
    let image = decode(&jpeg).expect("the encoder's file can be decoded");
    let mut group = criterion.benchmark_group("image 640x480");
    group.bench_function("decode JPEG", |bench| bench.iter(|| decode(black_box(&jpeg))));
    let mut position = 0;
    group.bench_function("train transform", |bench| {
        bench.iter(|| {
            position += 1;
            train_transform(black_box(&image), 224, Filter::Bicubic, 0, position)
        });
    });
    group.bench_function("evaluate transform", |bench| {
        bench.iter(|| evaluate_transform(black_box(&image), 224, Filter::Bicubic));
    });
    group.finish();
    criterion.bench_function("clean caption", |bench| {
        bench.iter(|| {
            clean_caption(black_box("Two cats (and \"one\" dog) lie on a sofa, beside a remote control."), Clean::Blip)
        });
    });
}

criterion_group!(benches, image_path);
criterion_main!(benches);
