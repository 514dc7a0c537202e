//! The fused kernels against tch's own operators, forward and backward: `cargo bench -p blip2-torchx`.
//!
//! Shapes are those of stage 1 with ViT-g: packed rows of width 768, self-attention over 51 tokens, cross-attention of
//! 32 queries to 257 image tokens.

use std::hint::black_box;

use blip2_torchx::dropout::{DropoutKey, attention, dropout, dropout_add_layer_norm};
use criterion::{Criterion, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

const P: f64 = 0.1;

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

fn keys(count: i64) -> Tensor {
    Tensor::arange(count, (Kind::Int64, Device::Cpu))
}

/// Forward and backward; gradients are computed, not accumulated.
fn step(inputs: &[&Tensor], upstream: &Tensor, f: impl Fn() -> Tensor) {
    let loss = (f() * upstream).sum(Kind::Float);
    black_box(Tensor::run_backward(&[loss], inputs, false, false));
}

fn bench_dropout(c: &mut Criterion) {
    let rows = keys(1300);
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = leaf(&[1300, 768], kind).detach();
        let mut group = c.benchmark_group(format!("dropout forward 1300x768 {kind:?}"));
        group.bench_function("keyed", |b| b.iter(|| black_box(dropout(&x, P, DropoutKey { site: 1, rows: &rows }))));
        group.bench_function("tch", |b| b.iter(|| black_box(x.dropout(P, true))));
        group.finish();
        let x = leaf(&[1300, 768], kind);
        let upstream = x.detach();
        let mut group = c.benchmark_group(format!("dropout both ways 1300x768 {kind:?}"));
        group.bench_function("keyed", |b| {
            b.iter(|| step(&[&x], &upstream, || dropout(&x, P, DropoutKey { site: 1, rows: &rows })));
        });
        group.bench_function("tch", |b| b.iter(|| step(&[&x], &upstream, || x.dropout(P, true))));
        group.bench_function("nothing", |b| b.iter(|| step(&[&x], &upstream, || x.shallow_clone())));
        group.finish();
    }
}

fn bench_layer_norm(c: &mut Criterion) {
    let rows = keys(1300);
    for kind in [Kind::Float, Kind::BFloat16] {
        let (x, residual) = (leaf(&[1300, 768], kind), leaf(&[1300, 768], kind));
        let (weight, bias) = (leaf(&[768], Kind::Float), leaf(&[768], Kind::Float));
        let upstream = x.detach();
        let inputs = [&x, &residual, &weight, &bias];
        let mut group = c.benchmark_group(format!("dropout_add_layer_norm 1300x768 {kind:?}"));
        group.bench_function("fused", |b| {
            b.iter(|| {
                step(&inputs, &upstream, || {
                    let key = DropoutKey { site: 1, rows: &rows };
                    dropout_add_layer_norm(&x, &residual, &weight, &bias, 1e-12, P, Some(key))
                });
            });
        });
        group.bench_function("tch", |b| {
            b.iter(|| {
                step(&inputs, &upstream, || {
                    (x.dropout(P, true) + &residual).layer_norm([768], Some(&weight), Some(&bias), 1e-12, true)
                });
            });
        });
        group.finish();
    }
}

fn bench_attention(c: &mut Criterion) {
    for (name, [b, n, m]) in [("self", [24, 51, 51]), ("cross", [24, 32, 257])] {
        let rows = keys(b);
        for kind in [Kind::Float, Kind::BFloat16] {
            let [q, k, v] = [n, m, m].map(|len| leaf(&[b, len, 768], kind));
            let heads = |t: &Tensor| t.view([b, -1, 12, 64]).transpose(1, 2);
            let mask = Tensor::ones([b, 1, n, m], (Kind::Bool, Device::Cpu));
            let upstream = Tensor::randn([b, 12, n, 64], (Kind::Float, Device::Cpu)).to_kind(kind);
            let mut group = c.benchmark_group(format!("attention {name} {b}x12x{n}x{m} {kind:?}"));
            group.bench_function("fused", |bench| {
                bench.iter(|| {
                    step(&[&q, &k, &v], &upstream, || {
                        let key = DropoutKey { site: 1, rows: &rows };
                        attention(&heads(&q), &heads(&k), &heads(&v), Some(&mask), P, Some(key))
                    });
                });
            });
            for (name, p) in [("tch", P), ("tch without dropout", 0.0)] {
                group.bench_function(name, |bench| {
                    bench.iter(|| {
                        step(&[&q, &k, &v], &upstream, || {
                            let (q, k, v) = (heads(&q), heads(&k), heads(&v));
                            Tensor::scaled_dot_product_attention(&q, &k, &v, Some(&mask), p, false, None, false)
                        });
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(30);
    targets = bench_dropout, bench_layer_norm, bench_attention
}
criterion_main!(kernels);
