//! Attention with keyed dropout against composed operators that use the op's own mask.

use blip2_torchx::autocast;
use blip2_torchx::dropout::{DropoutKey, attention};
use blip2_torchx::isa::Isa;
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Clone, Copy)]
struct Dims {
    b: i64,
    h: i64,
    n: i64,
    m: i64,
    d: i64,
}

fn row_keys(b: i64) -> Tensor {
    Tensor::arange(b, (Kind::Int64, Device::Cpu)) * 1000
}

/// The dropout factors of the probabilities [B, H, N, M]: equal scores make them 1/M, values of the identity show them.
fn factors(dims: Dims, p: f64, key: DropoutKey) -> Tensor {
    let Dims { b, h, n, m, d } = dims;
    let (q, k) = (Tensor::zeros([b, h, n, d], CPU), Tensor::zeros([b, h, m, d], CPU));
    let v = Tensor::eye(m, CPU).expand([b, h, m, m], false);
    attention(&q, &k, &v, None, p, Some(key)) * m as f64
}

fn composed(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, factors: &Tensor) -> Tensor {
    let scores = q.matmul(&k.transpose(-2, -1)) / (*q.size().last().unwrap() as f64).sqrt();
    let scores = match mask {
        Some(mask) => scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY),
        None => scores,
    };
    let kind = scores.kind();
    (scores.softmax(-1, kind) * factors.to_kind(kind)).matmul(v)
}

/// q, k, v as a model has them: views [B, H, N, D] of [B, N, H * D].
fn qkv(dims: Dims) -> [Tensor; 3] {
    let Dims { b, h, n, m, d } = dims;
    [n, m, m].map(|len| Tensor::randn([b, len, h * d], CPU))
}

fn heads(t: &Tensor, dims: Dims) -> Tensor {
    t.view([dims.b, -1, dims.h, dims.d]).transpose(1, 2)
}

fn run(
    inputs: &[Tensor; 3],
    dims: Dims,
    kind: Kind,
    upstream: &Tensor,
    f: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor,
) -> (Tensor, [Tensor; 3]) {
    let leaves = inputs.each_ref().map(|t| t.to_kind(kind).copy().set_requires_grad(true));
    let [q, k, v] = leaves.each_ref().map(|t| heads(t, dims));
    let y = f(&q, &k, &v);
    (&y * upstream.to_kind(y.kind())).sum(Kind::Double).backward();
    (y.detach(), leaves.map(|t| t.grad()))
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let b = b.to_kind(Kind::Double);
    ((a.to_kind(Kind::Double) - &b).abs().max() / b.abs().max()).double_value(&[])
}

/// Masks of every shape that broadcasts; column 0 is always allowed.
fn masks(dims: Dims) -> Vec<Option<Tensor>> {
    let shapes =
        [[dims.b, 1, 1, dims.m], [1, 1, dims.n, dims.m], [dims.b, 1, dims.n, dims.m], [dims.b, dims.h, dims.n, dims.m]];
    let random = shapes.into_iter().map(|shape| {
        let mask = Tensor::rand(shape, CPU).gt(0.4);
        let _ = mask.narrow(3, 0, 1).fill_(1);
        Some(mask)
    });
    std::iter::once(None).chain(random).collect()
}

#[test]
fn values_and_gradients_agree_with_the_composed_operators() {
    for (n, m) in [(51, 51), (32, 257), (3, 1), (2, 16), (7, 64), (5, 5)] {
        let dims = Dims { b: 2, h: 3, n, m, d: 16 };
        let keys = row_keys(dims.b);
        let key = DropoutKey { site: 77, rows: &keys };
        let factors = factors(dims, 0.2, key);
        let inputs = qkv(dims);
        let upstream = Tensor::randn([dims.b, dims.h, n, dims.d], CPU);
        for mask in masks(dims) {
            let mask = mask.as_ref();
            let (y, grads) =
                run(&inputs, dims, Kind::Float, &upstream, |q, k, v| attention(q, k, v, mask, 0.2, Some(key)));
            let (exact, exact_grads) =
                run(&inputs, dims, Kind::Double, &upstream, |q, k, v| composed(q, k, v, mask, &factors));
            assert!(relative(&y, &exact) < 2e-6, "{n}x{m}: {}", relative(&y, &exact));
            if m > 1 {
                for (got, expected) in grads.iter().zip(&exact_grads) {
                    assert!(relative(got, expected) < 5e-6, "{n}x{m}: {}", relative(got, expected));
                }
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-2;
    let dims = Dims { b: 1, h: 2, n: 3, m: 4, d: 2 };
    let keys = row_keys(1);
    let key = DropoutKey { site: 3, rows: &keys };
    let inputs = qkv(dims);
    let upstream = Tensor::randn([1, 2, 3, 2], CPU);
    let op = |q: &Tensor, k: &Tensor, v: &Tensor| attention(q, k, v, None, 0.3, Some(key));
    let (_, grads) = run(&inputs, dims, Kind::Float, &upstream, op);
    for (which, grad) in grads.iter().enumerate() {
        for i in 0..grad.numel() as i64 {
            let moved = |by: f64| {
                let copies = inputs.each_ref().map(Tensor::copy);
                let _ = copies[which].view([-1]).narrow(0, i, 1).g_add_scalar_(by);
                let [q, k, v] = copies.each_ref().map(|t| heads(t, dims));
                (op(&q, &k, &v) * &upstream).sum(Kind::Double).double_value(&[])
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let got = grad.reshape([-1]).double_value(&[i]);
            assert!(
                (slope - got).abs() < 1e-2 * (1.0 + slope.abs()),
                "input {which} element {i}: {slope} against {got}"
            );
        }
    }
}

#[test]
fn bf16_stays_near_fp32_and_ignores_autocast() {
    let dims = Dims { b: 2, h: 4, n: 19, m: 51, d: 32 };
    let keys = row_keys(2);
    let key = DropoutKey { site: 1, rows: &keys };
    let inputs = qkv(dims);
    let upstream = Tensor::randn([2, 4, 19, 32], CPU);
    let op = |q: &Tensor, k: &Tensor, v: &Tensor| {
        autocast(Device::Cpu, Some(Kind::BFloat16), || attention(q, k, v, None, 0.1, Some(key)))
    };
    let (exact, exact_grads) = run(&inputs, dims, Kind::Float, &upstream, op);
    assert_eq!(exact.kind(), Kind::Float);
    let (y, grads) = run(&inputs, dims, Kind::BFloat16, &upstream, op);
    assert_eq!(y.kind(), Kind::BFloat16);
    assert!(relative(&y, &exact) < 2e-2, "{}", relative(&y, &exact));
    for (got, expected) in grads.iter().zip(&exact_grads) {
        assert!(relative(got, expected) < 4e-2, "{}", relative(got, expected));
    }
}

#[test]
fn a_mask_depends_neither_on_the_batch_nor_on_padding() {
    let wide = Dims { b: 3, h: 2, n: 9, m: 70, d: 4 };
    let keys = row_keys(3);
    let all = factors(wide, 0.4, DropoutKey { site: 2, rows: &keys });
    let last = keys.narrow(0, 2, 1);
    let narrow = Dims { b: 1, n: 5, m: 33, ..wide };
    let alone = factors(narrow, 0.4, DropoutKey { site: 2, rows: &last });
    let part = all.narrow(0, 2, 1).narrow(2, 0, 5).narrow(3, 0, 33);
    assert!(alone.allclose(&part, 1e-5, 1e-6, false));
    assert!((all.not_equal(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]) - 0.6).abs() < 0.04);
}

#[test]
fn without_dropout_it_is_libtorchs_own_attention() {
    let dims = Dims { b: 2, h: 2, n: 5, m: 7, d: 8 };
    let [q, k, v] = qkv(dims).each_ref().map(|t| heads(t, dims));
    let keys = row_keys(2);
    let mask = masks(dims).remove(1);
    let own = Tensor::scaled_dot_product_attention(&q, &k, &v, mask.as_ref(), 0.0, false, None, false);
    assert!(attention(&q, &k, &v, mask.as_ref(), 0.1, None).equal(&own));
    assert!(attention(&q, &k, &v, mask.as_ref(), 0.0, Some(DropoutKey { site: 0, rows: &keys })).equal(&own));
}

#[test]
fn bf16_without_dropout_is_near_fp32_with_gradients() {
    let dims = Dims { b: 2, h: 3, n: 19, m: 37, d: 16 };
    tch::manual_seed(5);
    let (inputs, upstream) = (qkv(dims), Tensor::randn([2, 3, 19, 16], CPU));
    for mask in masks(dims) {
        let plain = |q: &Tensor, k: &Tensor, v: &Tensor| attention(q, k, v, mask.as_ref(), 0.0, None);
        let (expected, wide) = run(&inputs, dims, Kind::Float, &upstream, plain);
        let (got, narrow) = run(&inputs, dims, Kind::BFloat16, &upstream, plain);
        assert!(relative(&got, &expected) < 0.02);
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert!(relative(narrow, wide) < 0.03, "{}", relative(narrow, wide));
        }
    }
}

#[test]
fn threads_and_instruction_sets_do_not_change_the_softmax() {
    // Products of zeros and with the identity are exact everywhere: what is left is the kernel.
    let dims = Dims { b: 4, h: 3, n: 40, m: 53, d: 4 };
    let keys = row_keys(4);
    let before = (Isa::get(), tch::get_num_threads());
    let run = || factors(dims, 0.1, DropoutKey { site: 6, rows: &keys });
    let expected = run();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.set()) {
        for threads in [1, 3] {
            tch::set_num_threads(threads);
            assert!(run().equal(&expected), "{isa}, {threads} threads");
        }
    }
    assert!(before.0.set());
    tch::set_num_threads(before.1);
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let keys = row_keys(1);
    let q = Tensor::from_slice(&[200.0f32, -200.0]).view([1, 1, 2, 1]);
    let k = Tensor::from_slice(&[1.0f32, 0.0, -1.0]).view([1, 1, 3, 1]);
    let v = Tensor::eye(3, CPU).view([1, 1, 3, 3]);
    let y = attention(&q, &k, &v, None, 1e-5, Some(DropoutKey { site: 0, rows: &keys }));
    let expected = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 0.0, 0.0, 1.0]).view([1, 1, 2, 3]);
    assert!(y.allclose(&expected, 1e-4, 1e-30, false));
}

#[test]
#[should_panic(expected = "one dtype")]
fn mixed_dtypes_are_refused() {
    let keys = row_keys(1);
    let (q, k) = (Tensor::ones([1, 1, 2, 4], CPU), Tensor::ones([1, 1, 2, 4], (Kind::BFloat16, Device::Cpu)));
    let _ = attention(&q, &k, &k, None, 0.1, Some(DropoutKey { site: 0, rows: &keys }));
}
