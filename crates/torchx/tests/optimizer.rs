//! Foreach operators, AdamW and the gradient scaler against formulas.

use blip2_torchx::{AdamW, AdamWConfig, Error, GradScaler, foreach};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const CFG: AdamWConfig = AdamWConfig { betas: (0.9, 0.98), eps: 1e-8, weight_decay: 0.05 };

fn scalar(value: f64) -> Tensor {
    Tensor::full([], value, CPU)
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

fn set_grad(param: &Tensor, grad: &Tensor) {
    // The gradient of sum(param * grad) is grad.
    (param * grad).sum(Kind::Float).backward();
}

#[test]
fn norm_is_that_of_all_elements_together() {
    let tensors = [Tensor::randn([3, 5], CPU), Tensor::randn([7], CPU), Tensor::randn([], CPU)];
    let flat = Tensor::cat(&tensors.each_ref().map(|t| t.reshape([-1])), 0);
    let norm = foreach::norm(&tensors);
    assert!(norm.size().is_empty() && norm.kind() == Kind::Float);
    assert!(max_difference(&norm, &flat.norm()) < 1e-6);
    assert_eq!(foreach::norm(&[]).double_value(&[]), 0.0);
}

#[test]
fn norm_of_bf16_is_accumulated_in_fp32() {
    let ones = Tensor::ones([100_000], (Kind::BFloat16, Device::Cpu));
    assert!((foreach::norm(&[ones]).double_value(&[]) - 100_000f64.sqrt()).abs() < 1e-2);
}

#[test]
fn mul_scales_every_tensor_in_place() {
    let tensors = [Tensor::ones([2, 2], CPU), Tensor::full([3], 4.0, CPU)];
    foreach::mul_(&tensors, &scalar(0.5));
    assert_eq!(Vec::<f32>::try_from(&tensors[1]).unwrap(), [2.0; 3]);
    assert_eq!(tensors[0].sum(Kind::Float).double_value(&[]), 2.0);
}

#[test]
fn unscale_multiplies_and_finds_what_is_not_finite() {
    let grads = [Tensor::full([3], 8.0, CPU), Tensor::full([2], 2.0, CPU)];
    let found = scalar(0.0);
    foreach::unscale_(&grads, &found, &scalar(0.25));
    assert_eq!(found.double_value(&[]), 0.0);
    assert_eq!(Vec::<f32>::try_from(&grads[0]).unwrap(), [2.0; 3]);
    for bad in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
        let found = scalar(0.0);
        foreach::unscale_(&[Tensor::ones([4], CPU), Tensor::full([1], bad, CPU)], &found, &scalar(1.0));
        assert_eq!(found.double_value(&[]), 1.0, "{bad}");
    }
}

/// AdamW as the paper's algorithm 2 has it, in fp64.
fn reference_step(p: &Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, t: i32, lr: f64, decay: f64) -> Tensor {
    let (b1, b2) = CFG.betas;
    *m = &*m * b1 + g * (1.0 - b1);
    *v = &*v * b2 + g * g * (1.0 - b2);
    let m_hat = &*m / (1.0 - b1.powi(t));
    let v_hat = &*v / (1.0 - b2.powi(t));
    p * (1.0 - lr * decay) - m_hat / (v_hat.sqrt() + CFG.eps) * lr
}

#[test]
fn adamw_follows_the_algorithm_with_and_without_decay() {
    let params = [Tensor::randn([4, 6], CPU), Tensor::randn([6], CPU)].map(|t| t.set_requires_grad(true));
    let mut optimizer = AdamW::new(
        vec![("weight".into(), params[0].shallow_clone(), true), ("bias".into(), params[1].shallow_clone(), false)],
        CFG,
    );
    let mut expected = params.each_ref().map(|p| p.detach().to_kind(Kind::Double));
    let mut m = expected.each_ref().map(Tensor::zeros_like);
    let mut v = expected.each_ref().map(Tensor::zeros_like);
    for t in 1..=10 {
        optimizer.zero_grad();
        let lr = 0.01 / f64::from(t);
        for i in 0..2 {
            let grad = Tensor::randn_like(&params[i].detach());
            set_grad(&params[i], &grad);
            let decay = if i == 0 { CFG.weight_decay } else { 0.0 };
            let grad = grad.to_kind(Kind::Double);
            expected[i] = reference_step(&expected[i], &grad, &mut m[i], &mut v[i], t, lr, decay);
        }
        optimizer.step(lr, None, None);
    }
    for i in 0..2 {
        assert!(max_difference(&params[i].to_kind(Kind::Double), &expected[i]) < 1e-6);
    }
}

#[test]
fn a_found_inf_skips_the_step_counters_included() {
    let param = Tensor::ones([3], CPU).set_requires_grad(true);
    let mut optimizer = AdamW::new(vec![("p".into(), param.shallow_clone(), true)], CFG);
    set_grad(&param, &Tensor::full([3], f64::INFINITY, CPU));
    for flag in [1.0, 3.0] {
        optimizer.step(0.1, None, Some(&scalar(flag)));
        assert_eq!(Vec::<f32>::try_from(param.detach()).unwrap(), [1.0; 3]);
        for (key, tensor) in optimizer.state() {
            assert_eq!(tensor.abs().sum(Kind::Float).double_value(&[]), 0.0, "{key}");
        }
    }
    optimizer.zero_grad();
    set_grad(&param, &Tensor::ones([3], CPU));
    optimizer.step(0.1, None, Some(&scalar(0.0)));
    let state: std::collections::HashMap<_, _> = optimizer.state().into_iter().collect();
    assert_eq!(state["step.p"].double_value(&[]), 1.0);
    assert!(param.detach().max().double_value(&[]) < 1.0);
}

#[test]
fn a_grad_scale_divides_the_gradients() {
    let params = [Tensor::ones([3], CPU), Tensor::ones([3], CPU)].map(|t| t.set_requires_grad(true));
    let grad = Tensor::from_slice(&[0.1f32, -2.0, 3.0]);
    for (param, scale) in params.iter().zip([1.0, 1024.0]) {
        let mut optimizer = AdamW::new(vec![("p".into(), param.shallow_clone(), true)], CFG);
        set_grad(param, &(&grad * scale));
        optimizer.step(0.1, Some(&scalar(scale)), None);
    }
    assert!(max_difference(&params[0].detach(), &params[1].detach()) < 1e-7);
}

#[test]
fn a_parameter_without_gradient_is_left_alone() {
    let used = Tensor::ones([2], CPU).set_requires_grad(true);
    let unused = Tensor::ones([2], CPU).set_requires_grad(true);
    let mut optimizer = AdamW::new(
        vec![("used".into(), used.shallow_clone(), true), ("unused".into(), unused.shallow_clone(), true)],
        CFG,
    );
    set_grad(&used, &Tensor::ones([2], CPU));
    optimizer.step(0.1, None, None);
    assert_eq!(Vec::<f32>::try_from(unused.detach()).unwrap(), [1.0; 2]);
    optimizer.zero_grad();
    assert!(!used.grad().defined());
}

#[test]
fn a_saved_optimizer_goes_on_to_the_same_bits() {
    let grads: Vec<Tensor> = (0..6).map(|_| Tensor::randn([5, 3], CPU)).collect();
    let run = |param: &Tensor, optimizer: &mut AdamW, grads: &[Tensor]| {
        for grad in grads {
            optimizer.zero_grad();
            set_grad(param, grad);
            optimizer.step(0.02, None, None);
        }
    };
    let start = Tensor::randn([5, 3], CPU);
    let whole = start.copy().set_requires_grad(true);
    let mut optimizer = AdamW::new(vec![("w".into(), whole.shallow_clone(), true)], CFG);
    run(&whole, &mut optimizer, &grads);

    let half = start.copy().set_requires_grad(true);
    let mut first = AdamW::new(vec![("w".into(), half.shallow_clone(), true)], CFG);
    run(&half, &mut first, &grads[..3]);
    let saved: std::collections::HashMap<_, _> =
        first.state().into_iter().map(|(key, tensor)| (key, tensor.copy())).collect();
    let resumed = half.detach().copy().set_requires_grad(true);
    let mut second = AdamW::new(vec![("w".into(), resumed.shallow_clone(), true)], CFG);
    second.load_state(|key| saved.get(key).map(Tensor::shallow_clone)).unwrap();
    run(&resumed, &mut second, &grads[3..]);
    assert!(whole.equal(&resumed));
}

#[test]
fn a_state_that_does_not_fit_lists_everything_and_changes_nothing() {
    let param = Tensor::ones([2, 2], CPU).set_requires_grad(true);
    let mut optimizer = AdamW::new(vec![("w".into(), param, true)], CFG);
    let error = optimizer
        .load_state(|key| match key {
            "exp_avg.w" => Some(Tensor::ones([3], CPU)),
            "step.w" => Some(scalar(7.0)),
            _ => None,
        })
        .unwrap_err();
    assert!(matches!(&error, Error::State { problems } if problems.len() == 2));
    let text = error.to_string();
    assert!(text.contains("exp_avg.w has shape [3], expected [2, 2]"), "{text}");
    assert!(text.contains("exp_avg_sq.w is missing"), "{text}");
    assert_eq!(optimizer.state()[2].1.double_value(&[]), 0.0);
}

#[test]
fn the_scale_grows_backs_off_and_stops_at_its_floor() {
    let mut scaler = GradScaler::new(Device::Cpu, true);
    let value = |scaler: &GradScaler| scaler.current_scale().double_value(&[]);
    assert_eq!(value(&scaler), 65536.0);
    for _ in 0..1999 {
        scaler.update(&scalar(0.0));
    }
    assert_eq!(value(&scaler), 65536.0);
    scaler.update(&scalar(0.0));
    assert_eq!(value(&scaler), 131_072.0);
    for _ in 0..30 {
        scaler.update(&scalar(1.0));
    }
    assert_eq!(value(&scaler), GradScaler::FLOOR);
}

#[test]
fn scaled_losses_and_unscaled_gradients_cancel() {
    let scaler = GradScaler::new(Device::Cpu, true);
    let w = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
    scaler.scale(&w.square().sum(Kind::Float)).backward();
    let found = scalar(0.0);
    foreach::unscale_(&[w.grad()], &found, &scaler.inv_scale());
    assert_eq!(Vec::<f32>::try_from(w.grad()).unwrap(), [2.0, 4.0]);
}

#[test]
fn a_disabled_scaler_is_the_identity() {
    let mut scaler = GradScaler::new(Device::Cpu, false);
    let loss = scalar(3.0);
    assert!(scaler.scale(&loss).equal(&loss));
    scaler.update(&scalar(1.0));
    assert_eq!(scaler.inv_scale().double_value(&[]), 1.0);
    assert!(!scaler.is_enabled());
}

#[test]
fn a_scaler_resumes_where_it_was() {
    let mut scaler = GradScaler::new(Device::Cpu, true);
    scaler.update(&scalar(1.0));
    for _ in 0..1500 {
        scaler.update(&scalar(0.0));
    }
    let mut resumed = GradScaler::new(Device::Cpu, true);
    let state: std::collections::HashMap<_, _> = scaler.state().into_iter().collect();
    resumed.load_state(|key| state.get(key).map(Tensor::shallow_clone)).unwrap();
    for _ in 0..500 {
        resumed.update(&scalar(0.0));
    }
    assert_eq!(resumed.current_scale().double_value(&[]), 65536.0);
    let error = no_grad(|| resumed.load_state(|_| None)).unwrap_err().to_string();
    assert!(error.contains("growth_tracker is missing") && error.contains("scale is missing"), "{error}");
}
