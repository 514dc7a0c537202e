//! The fused dropout, residual sum and layer normalisation against the composed operators.

use blip2_torchx::dropout::{DropoutKey, dropout, dropout_add_layer_norm};
use blip2_torchx::isa::Isa;
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const EPS: f64 = 1e-12;

struct Case {
    inputs: [Tensor; 4], // x, residual, weight, bias
    rows: Tensor,
    upstream: Tensor,
}

impl Case {
    fn new(shape: &[i64]) -> Self {
        let columns = shape[shape.len() - 1];
        // The columns lie apart: a narrow row of equal values has no variance, and its rounding has no bound.
        let spread = Tensor::linspace(-2.0, 3.0, columns, CPU);
        let inputs = [
            Tensor::rand(shape, CPU) - 0.5,
            Tensor::rand(shape, CPU) * 0.5 + spread,
            Tensor::rand([columns], CPU) + 0.5,
            Tensor::randn([columns], CPU),
        ];
        // Not around zero: sums over few rows would cancel.
        let upstream = Tensor::randn(shape, CPU) + 1.0;
        Self { inputs, rows: Tensor::arange(shape[0], (Kind::Int64, Device::Cpu)), upstream }
    }

    /// The result and the gradients of x, residual, weight and bias.
    fn run(&self, kinds: [Kind; 2], f: impl Fn(&[Tensor; 4], DropoutKey) -> Tensor) -> (Tensor, [Tensor; 4]) {
        let mut kind = kinds.into_iter().chain([self.inputs[2].kind(); 2]);
        let leaves = self.inputs.each_ref().map(|t| t.to_kind(kind.next().unwrap()).copy().set_requires_grad(true));
        let y = f(&leaves, DropoutKey { site: 9, rows: &self.rows });
        (&y * self.upstream.to_kind(y.kind())).sum(Kind::Double).backward();
        (y.detach(), leaves.map(|leaf| leaf.grad()))
    }

    fn fused(&self, kinds: [Kind; 2], p: f64) -> (Tensor, [Tensor; 4]) {
        self.run(kinds, |[x, r, w, b], key| dropout_add_layer_norm(x, r, w, b, EPS, p, Some(key)))
    }

    fn to_kind(&self, kind: Kind) -> Self {
        Self {
            inputs: self.inputs.each_ref().map(|t| t.to_kind(kind)),
            rows: self.rows.shallow_clone(),
            upstream: self.upstream.to_kind(kind),
        }
    }
}

fn composed([x, r, w, b]: &[Tensor; 4], p: f64, key: DropoutKey) -> Tensor {
    (dropout(x, p, key) + r).layer_norm(w.size(), Some(w), Some(b), EPS, true)
}

/// The largest difference over the largest value.
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let b = b.to_kind(Kind::Double);
    ((a.to_kind(Kind::Double) - &b).abs().max() / b.abs().max()).double_value(&[])
}

#[test]
fn fp32_agrees_with_the_composed_operators_to_rounding() {
    for shape in [vec![70, 768], vec![3, 5, 51], vec![33, 16], vec![2, 40, 130], vec![5, 1, 3]] {
        for p in [0.0, 0.1] {
            let case = Case::new(&shape);
            let (y, grads) = case.fused([Kind::Float; 2], p);
            // fp64 is composed and shares the mask: what differs is rounding alone.
            let (exact, exact_grads) = case.to_kind(Kind::Double).run([Kind::Double; 2], |i, key| composed(i, p, key));
            assert!(relative(&y, &exact) < 1e-6, "{shape:?} p {p}: {}", relative(&y, &exact));
            for (name, (got, expected)) in
                ["x", "residual", "weight", "bias"].iter().zip(grads.iter().zip(&exact_grads))
            {
                let difference = relative(got, expected);
                assert!(difference < 2e-6, "{shape:?} p {p} grad {name}: {difference}");
            }
            let (plain, _) = case.run([Kind::Float; 2], |i, key| composed(i, p, key));
            assert!(relative(&y, &plain) < 1e-6);
        }
    }
}

#[test]
fn the_result_has_the_dtype_of_the_residual_and_gradients_those_of_their_inputs() {
    let case = Case::new(&[20, 96]);
    let (exact, exact_grads) = case.run([Kind::Float; 2], |i, key| composed(i, 0.1, key));
    for kinds in [
        [Kind::BFloat16, Kind::BFloat16],
        [Kind::BFloat16, Kind::Float],
        [Kind::Float, Kind::BFloat16],
        [Kind::Half, Kind::Float],
    ] {
        let (y, grads) = case.fused(kinds, 0.1);
        assert_eq!(y.kind(), kinds[1]);
        assert_eq!([grads[0].kind(), grads[1].kind()], kinds);
        // bf16 carries 8 bits.
        assert!(relative(&y, &exact) < 2e-2, "{kinds:?}");
        for (got, expected) in grads.iter().zip(&exact_grads) {
            assert!(relative(got, expected) < 3e-2, "{kinds:?}: {}", relative(got, expected));
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-2;
    let case = Case::new(&[2, 2, 7]);
    let (_, grads) = case.fused([Kind::Float; 2], 0.3);
    let value = |inputs: &[Tensor; 4]| {
        let key = DropoutKey { site: 9, rows: &case.rows };
        let y = dropout_add_layer_norm(&inputs[0], &inputs[1], &inputs[2], &inputs[3], EPS, 0.3, Some(key));
        (y * &case.upstream).sum(Kind::Double).double_value(&[])
    };
    for (which, grad) in grads.iter().enumerate() {
        for i in 0..grad.numel() as i64 {
            let moved = |by: f64| {
                let inputs = case.inputs.each_ref().map(Tensor::copy);
                let mut element = inputs[which].view([-1]).narrow(0, i, 1);
                let _ = element.g_add_scalar_(by);
                value(&inputs)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let got = grad.reshape([-1]).double_value(&[i]);
            assert!(
                (slope - got).abs() < 2e-2 * (1.0 + slope.abs()),
                "input {which} element {i}: {slope} against {got}"
            );
        }
    }
}

#[test]
fn threads_and_instruction_sets_do_not_change_the_bits() {
    let case = Case::new(&[200, 83]);
    let before = (Isa::get(), tch::get_num_threads());
    let (y, grads) = case.fused([Kind::Float, Kind::BFloat16], 0.1);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.set()) {
        for threads in [1, 3] {
            tch::set_num_threads(threads);
            let (again, grads_again) = case.fused([Kind::Float, Kind::BFloat16], 0.1);
            assert!(again.equal(&y), "{isa}, {threads} threads");
            assert!(grads.iter().zip(&grads_again).all(|(a, b)| a.equal(b)), "{isa}, {threads} threads");
        }
    }
    assert!(before.0.set());
    tch::set_num_threads(before.1);
}

#[test]
#[should_panic(expected = "one shape")]
fn a_residual_of_another_shape_is_refused() {
    let (x, r, w) = (Tensor::ones([2, 8], CPU), Tensor::ones([2, 1], CPU), Tensor::ones([8], CPU));
    let _ = dropout_add_layer_norm(&x, &r, &w, &w, EPS, 0.0, None);
}
