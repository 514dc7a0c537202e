//! Autocast by device and dtype.

use std::panic::{AssertUnwindSafe, catch_unwind};

use blip2_torchx::autocast;
use blip2_torchx::autocast::cast;
use tch::{Device, Kind, Tensor, no_grad};

fn product_kind(a: &Tensor) -> Kind {
    a.matmul(a).kind()
}

#[test]
fn matrix_products_take_the_dtype_and_calls_nest() {
    let a = Tensor::rand([8, 8], (Kind::Float, Device::Cpu));
    assert_eq!(product_kind(&a), Kind::Float);
    autocast(Device::Cpu, Some(Kind::BFloat16), || {
        assert_eq!(product_kind(&a), Kind::BFloat16);
        autocast(Device::Cpu, None, || assert_eq!(product_kind(&a), Kind::Float));
        assert_eq!(product_kind(&a), Kind::BFloat16);
        autocast(Device::Cpu, Some(Kind::Half), || assert_eq!(product_kind(&a), Kind::Half));
        assert_eq!(product_kind(&a), Kind::BFloat16);
    });
    assert_eq!(product_kind(&a), Kind::Float);
}

#[test]
fn cast_follows_what_is_set() {
    let a = Tensor::rand([8, 8], (Kind::Float, Device::Cpu));
    assert_eq!(cast(&a).data_ptr(), a.data_ptr());
    for kind in [Kind::BFloat16, Kind::Half] {
        assert!(autocast(Device::Cpu, Some(kind), || cast(&a)).equal(&a.to_kind(kind)));
    }
    autocast(Device::Cpu, Some(Kind::BFloat16), || {
        assert_eq!(autocast(Device::Cpu, None, || cast(&a)).kind(), Kind::Float);
    });
}

#[test]
fn a_panic_restores_what_was_set() {
    let a = Tensor::rand([8, 8], (Kind::Float, Device::Cpu));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        autocast(Device::Cpu, Some(Kind::BFloat16), || panic!("inside"));
    }));
    assert!(outcome.is_err());
    assert_eq!(product_kind(&a), Kind::Float);
}

#[test]
fn the_cast_copies_of_parameters_end_with_the_outermost_call() {
    let input = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
    let mut weight = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let sum = |weight: &Tensor| {
        autocast(Device::Cpu, Some(Kind::BFloat16), || input.matmul(weight).sum(Kind::Float)).double_value(&[])
    };
    assert_eq!(sum(&weight), 16.0);
    let _ = no_grad(|| weight.fill_(2.0));
    assert_eq!(sum(&weight), 32.0);
}

#[test]
fn gradients_come_back_in_fp32_and_equal_the_bf16_product() {
    let x = Tensor::rand([4, 8], (Kind::Float, Device::Cpu));
    let w = Tensor::rand([8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let y = autocast(Device::Cpu, Some(Kind::BFloat16), || x.matmul(&w));
    y.to_kind(Kind::Float).sum(Kind::Float).backward();
    let expected =
        x.to_kind(Kind::BFloat16).transpose(0, 1).matmul(&Tensor::ones([4, 8], (Kind::BFloat16, Device::Cpu)));
    assert_eq!(w.grad().kind(), Kind::Float);
    assert!(w.grad().allclose(&expected.to_kind(Kind::Float), 1e-6, 1e-6, false));
}

#[test]
#[should_panic(expected = "only Half and BFloat16")]
fn autocast_to_a_full_precision_is_refused() {
    autocast(Device::Cpu, Some(Kind::Double), || ());
}
