//! A batch that is computed in parts under `contrastive: cached` has the large batch's gradient.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blip2_model::qformer::TextBatch;
use blip2_torchx::{dropout, rng};
use blip2_trainer::batch::{Batch, Negatives, Share, Targets};
use blip2_trainer::model_files::ModelFiles;
use blip2_trainer::ranks::Alone;
use blip2_trainer::task::stage1::{Stage1Options, Stage1Task};
use blip2_trainer::task::{ForwardOptions, Losses, Task};
use tch::{Device, IndexOp, Kind, Tensor};

const SAMPLES: i64 = 64;
const PART: i64 = 8;
const TOKENS: i64 = 7;

fn task(options: Stage1Options) -> Stage1Task {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/stage1");
    ModelFiles::open(&case).unwrap().stage1_task(Device::Cpu, options).unwrap()
}

/// Numbers in [0, 1) without order, by formula: tests run beside each other, and libtorch's generator is one for all.
fn numbers(shape: &[i64], salt: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    let x = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + salt).sin() * 43_758.545_3;
    (&x - x.floor()).to_kind(Kind::Float).clamp_max(0.999_999).view(shape)
}

/// Samples `first ..` of a batch that is always the same one.
fn batch(task: &Stage1Task, first: i64, count: i64) -> Batch {
    let width =
        task.params.entries().iter().find(|(n, ..)| n == "vision_model.post_layernorm.weight").unwrap().1.numel();
    let features = (numbers(&[SAMPLES, 5, width as i64], 0.1) - 0.5) * 4.0;
    let ids = (numbers(&[SAMPLES, TOKENS], 0.2) * 196.0).to_kind(Kind::Int64) + 4;
    let (image, text) = (numbers(&[SAMPLES], 0.3), numbers(&[SAMPLES], 0.4));
    let rows = first..first + count;
    let ids = ids.i(rows.clone());
    let labels = ids.copy();
    let _ = labels.narrow(1, 0, 1).fill_(-100);
    let share = count as f64 / SAMPLES as f64;
    Batch {
        features: features.i(rows.clone()),
        text: TextBatch::new(ids.copy(), &ids.ones_like()),
        targets: Targets::from_labels(&labels, 0),
        // One image stands in the batch twice.
        image_ids: Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu)).remainder(SAMPLES - 1),
        positions: Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu)),
        negatives: Negatives::Sample(image.i(rows.clone()), text.i(rows)),
        share: Share { samples: share, tokens: share },
        sent_as: Kind::Float,
    }
}

/// Gradients and the named losses of the whole batch, in parts of `part`.
fn step(options: Stage1Options, part: i64, dropout: f64) -> (Vec<(String, Tensor)>, Vec<f64>) {
    let task = {
        let _alone = generator();
        task(options)
    };
    step_of(&task, part, dropout)
}

/// libtorch's generator, which is one for all tests: parameters draw from it before they are loaded.
fn generator() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn step_of(task: &Stage1Task, part: i64, dropout: f64) -> (Vec<(String, Tensor)>, Vec<f64>) {
    let batches: Vec<_> = (0..SAMPLES / part).map(|n| Ok(batch(task, n * part, part))).collect();
    let pass = ForwardOptions { autocast: None, dropout, seed: 5 };
    let mut sums = vec![0.0; 8];
    let mut count = 0;
    let mut each = |losses: Losses, last: bool| {
        losses.total.backward();
        sums.iter_mut().zip(&losses.metrics).for_each(|(sum, (_, value))| *sum += value.double_value(&[]));
        count += 1;
        assert_eq!(last, count == SAMPLES / part);
        Ok(())
    };
    task.step(&mut batches.into_iter(), &pass, &Alone, &mut each).unwrap();
    let gradient = |(name, tensor, _): (String, Tensor, bool)| (name, tensor.grad().copy());
    (task.params.entries().into_iter().map(gradient).collect(), sums)
}

fn compare(options: Stage1Options, dropout: f64, tolerance: f64) {
    let whole = step(options, SAMPLES, dropout);
    assert_same(&step(Stage1Options { cached: true, ..options }, PART, dropout), &whole, tolerance);
}

fn assert_same(
    (parts, got): &(Vec<(String, Tensor)>, Vec<f64>),
    (whole, expected): &(Vec<(String, Tensor)>, Vec<f64>),
    tolerance: f64,
) {
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{got:?} {expected:?}");
    }
    let norm = |t: &Tensor| t.norm().double_value(&[]);
    for ((name, whole), (_, part)) in whole.iter().zip(parts) {
        // A gradient that is zero by mathematics (a key's bias) is rounding noise on both sides.
        let noise = norm(whole) < 1e-6 && norm(part) < 1e-6;
        let error = norm(&(whole - part)) / norm(whole).max(1e-30);
        assert!(error < tolerance || noise, "{name}: {error:e} of {:e}", norm(whole));
    }
}

fn itc_only() -> Stage1Options {
    Stage1Options { itm: 0.0, itg: 0.0, ..Stage1Options::default() }
}

#[test]
fn itc_in_parts_has_the_gradient_of_the_whole() {
    compare(itc_only(), 0.0, 1e-5);
}

#[test]
fn with_dropout_both_passes_draw_the_same_masks() {
    compare(itc_only(), 0.1, 1e-5);
}

/// Masks that are drawn one after the other, as on a GPU. In a single part, so that the whole batch can be given those of the part: they begin at
/// the seed that its second pass has left.
#[test]
fn with_drawn_masks_too_both_passes_drop_the_same() {
    let _alone = generator();
    let drawn = |options, seed| {
        let task = task(options);
        rng::seed(Device::Cpu, seed).unwrap();
        dropout::as_on_cuda(|| step_of(&task, SAMPLES, 0.1))
    };
    let cached = drawn(Stage1Options { cached: true, ..itc_only() }, 3);
    let seed_of_part = rng::current_seed(Device::Cpu).unwrap();
    let whole = drawn(itc_only(), seed_of_part);
    let others = drawn(itc_only(), seed_of_part + 1);
    assert!((whole.1[1] - others.1[1]).abs() > 1e-4, "masks that differ show: {} {}", whole.1[1], others.1[1]);
    // The other losses are those of pairs with masks of their own.
    let itc = |(gradients, losses): (Vec<(String, Tensor)>, Vec<f64>)| (gradients, losses[..2].to_vec());
    assert_same(&itc(cached), &itc(whole), 1e-5);
}

#[test]
fn all_losses_in_parts_are_those_of_the_whole_with_its_negatives() {
    compare(Stage1Options::default(), 0.1, 1e-4);
}

#[test]
fn parts_by_themselves_are_not_the_whole() {
    let (_, whole) = step(itc_only(), SAMPLES, 0.0);
    let (_, parts) = step(itc_only(), PART, 0.0);
    assert!((whole[1] - parts[1]).abs() > 0.1, "{whole:?} {parts:?}");
}
