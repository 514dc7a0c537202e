//! Keyed dropout: the law of its masks, their statistics, values and gradients.

use blip2_torchx::dropout::{DropoutKey, dropout};
use blip2_torchx::isa::Isa;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn rows(range: std::ops::Range<i64>) -> Tensor {
    Tensor::arange_start(range.start, range.end, (Kind::Int64, Device::Cpu))
}

/// Zero or the scale for every element of `[rows, columns]`.
fn factors(columns: i64, p: f64, site: u64, rows: &Tensor) -> Tensor {
    dropout(&Tensor::ones([rows.size()[0], columns], CPU), p, DropoutKey { site, rows })
}

fn kept(columns: i64, p: f64, site: u64, rows: &Tensor) -> Tensor {
    factors(columns, p, site, rows).not_equal(0.0).to_kind(Kind::Double)
}

fn correlation(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.reshape([-1]) - a.mean(None), b.reshape([-1]) - b.mean(None));
    (a.dot(&b) / (a.norm() * b.norm())).double_value(&[])
}

#[test]
fn the_first_block_is_philox_4x32_10_with_its_published_answer() {
    // Random123's known answer for counter and key of all zeros. An element's 16 bits are the number of thresholds that
    // it survives.
    let zero = rows(0..1);
    let mut bits = vec![0u32; 64];
    for step in (0..16).rev() {
        let survived: Vec<bool> = bits
            .iter()
            .enumerate()
            .map(|(column, &low)| {
                let threshold = low + (1 << step);
                factors(64, f64::from(threshold) / 65536.0, 0, &zero).double_value(&[0, column as i64]) != 0.0
            })
            .collect();
        bits.iter_mut().zip(survived).for_each(|(low, up)| *low += u32::from(up) << step);
    }
    let word = |quarter: usize, lane: usize| bits[quarter * 16 + 16 + lane] << 16 | bits[quarter * 16 + lane];
    let block = [word(0, 0), word(0, 1), word(2, 0), word(2, 1)];
    assert_eq!(block, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
}

#[test]
fn what_is_kept_is_scaled_by_the_inverse_of_the_rounded_probability() {
    for p in [0.1f64, 0.5, 1e-5, 0.9] {
        let threshold = (p * 65536.0).round();
        let scale = (65536.0 / (65536.0 - threshold)) as f32;
        let values = Vec::<f32>::try_from(factors(640, p, 3, &rows(0..10)).reshape([-1])).unwrap();
        assert!(values.iter().all(|&v| v == 0.0 || v == scale), "p {p}");
        assert!(values.contains(&scale), "p {p}");
    }
}

#[test]
fn mean_and_variance_are_those_of_a_coin() {
    // 2^20 elements: five standard deviations.
    for p in [0.1, 0.3, 0.5, 0.9] {
        let kept = kept(1024, p, 11, &rows(0..1024));
        let sigma = (p * (1.0 - p) / f64::from(1 << 20)).sqrt();
        let mean = kept.mean(Kind::Double).double_value(&[]);
        assert!((mean - (1.0 - p)).abs() < 5.0 * sigma + 1e-5, "p {p}: mean {mean}");
        // Counts per row and per column spread as binomials do, neither more nor less.
        for dim in [0, 1] {
            let counts = kept.sum_dim_intlist(dim, false, Kind::Double);
            let ratio = counts.var(true).double_value(&[]) / (1024.0 * p * (1.0 - p));
            assert!((0.78..1.22).contains(&ratio), "p {p}, dim {dim}: {ratio}");
        }
    }
}

#[test]
fn rows_sites_neighbouring_keys_and_columns_are_independent() {
    let keys = rows(1000..1256);
    let base = kept(512, 0.5, 42, &keys);
    let limit = 5.0 / f64::from(256 * 512).sqrt();
    let far = Tensor::from_slice(&(1000..1256).map(|k: i64| k | 1 << 40).collect::<Vec<_>>());
    let others = [
        ("site + 1", kept(512, 0.5, 43, &keys)),
        ("site with a high bit", kept(512, 0.5, 42 | 1 << 63, &keys)),
        ("row + 1", kept(512, 0.5, 42, &rows(1001..1257))),
        ("row with a high bit", kept(512, 0.5, 42, &far)),
        ("site and row swapped", kept(512, 0.5, 1000, &rows(42..298))),
    ];
    for (name, other) in &others {
        let c = correlation(&base, other);
        assert!(c.abs() < limit, "{name}: {c}");
    }
    for shift in [1, 2, 8, 16, 32, 64, 128] {
        let c = correlation(&base.narrow(1, 0, 512 - shift), &base.narrow(1, shift, 512 - shift));
        assert!(c.abs() < 1.2 * limit, "columns {shift} apart: {c}");
    }
    let lines = dropout(&Tensor::ones([64, 16, 128], CPU), 0.5, DropoutKey { site: 1, rows: &rows(0..64) });
    let c = correlation(&lines.narrow(1, 0, 15), &lines.narrow(1, 1, 15));
    assert!(c.abs() < 5.0 / f64::from(64 * 15 * 128).sqrt(), "neighbouring lines: {c}");
}

#[test]
fn threads_and_instruction_sets_do_not_change_the_bits() {
    let x = Tensor::randn([300, 777], CPU);
    let keys = rows(-150..150);
    let run = || dropout(&x, 0.1, DropoutKey { site: 7, rows: &keys });
    let before = (Isa::get(), tch::get_num_threads());
    let expected = run();
    for isa in Isa::ALL {
        if !isa.set() {
            eprintln!("skipped: this machine has no {isa}");
            continue;
        }
        for threads in [1, 2, 5] {
            tch::set_num_threads(threads);
            assert!(run().equal(&expected), "{isa}, {threads} threads");
        }
    }
    assert!(before.0.set());
    tch::set_num_threads(before.1);
}

#[test]
fn the_gradient_goes_through_the_same_mask() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Half] {
        let x = Tensor::randn([9, 3, 70], CPU).to_kind(kind).set_requires_grad(true);
        let keys = rows(0..9);
        let y = dropout(&x, 0.25, DropoutKey { site: 5, rows: &keys });
        let upstream = Tensor::randn([9, 3, 70], CPU).to_kind(kind);
        (&y * &upstream).sum(Kind::Float).backward();
        let mask = dropout(&Tensor::ones([9, 3, 70], CPU), 0.25, DropoutKey { site: 5, rows: &keys });
        let expect = |t: &Tensor| (t.to_kind(Kind::Float) * &mask).to_kind(kind);
        assert_eq!(y.kind(), kind);
        assert!(y.allclose(&expect(&x), 1e-2, 1e-6, false), "{kind:?}");
        assert!(x.grad().allclose(&expect(&upstream), 1e-2, 1e-6, false), "{kind:?}");
        if matches!(kind, Kind::Float | Kind::BFloat16) {
            assert!(y.equal(&expect(&x)) && x.grad().equal(&expect(&upstream)), "{kind:?}");
        }
    }
}

#[test]
fn the_ends_of_p_keep_all_and_nothing() {
    let x = Tensor::randn([4, 33], CPU);
    let keys = rows(0..4);
    assert!(dropout(&x, 0.0, DropoutKey { site: 0, rows: &keys }).equal(&x));
    assert!(dropout(&x, 1.0, DropoutKey { site: 0, rows: &keys }).equal(&x.zeros_like()));
}

#[test]
fn strided_views_and_empty_tensors_are_fine() {
    let x = Tensor::randn([40, 12], CPU);
    let keys = rows(0..12);
    let key = DropoutKey { site: 1, rows: &keys };
    assert!(dropout(&x.tr(), 0.3, key).equal(&dropout(&x.tr().contiguous(), 0.3, key)));
    let none = rows(0..0);
    assert_eq!(dropout(&Tensor::ones([0, 8], CPU), 0.3, DropoutKey { site: 1, rows: &none }).size(), [0, 8]);
}

#[test]
#[should_panic(expected = "not in [0, 1]")]
fn a_probability_above_one_is_refused() {
    let _ = factors(8, 1.5, 0, &rows(0..2));
}

#[test]
#[should_panic(expected = "shape [3]")]
fn rows_of_another_length_are_refused() {
    let keys = rows(0..2);
    let _ = dropout(&Tensor::ones([3, 8], CPU), 0.5, DropoutKey { site: 0, rows: &keys });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_samples_mask_is_the_same_in_every_batch(
        keys in prop::collection::vec(any::<i64>(), 1..8),
        columns in 1i64..200,
        lines in 1i64..4,
        site in any::<u64>(),
        p in 0.01f64..0.99,
    ) {
        let batch = keys.len() as i64;
        let ones = Tensor::ones([batch, lines, columns], CPU);
        let all = Tensor::from_slice(&keys);
        let together = dropout(&ones, p, DropoutKey { site, rows: &all });
        for (i, &key) in keys.iter().enumerate() {
            let own = Tensor::from_slice(&[key]);
            let alone = dropout(&ones.narrow(0, 0, 1), p, DropoutKey { site, rows: &own });
            prop_assert!(alone.equal(&together.narrow(0, i as i64, 1)));
        }
    }
}
