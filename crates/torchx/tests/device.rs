//! Device selection and the process-wide switches.

use std::sync::{Mutex, MutexGuard, PoisonError};

use blip2_torchx::device::{self, DeviceChoice};
use blip2_torchx::sdpa::Backends;
use blip2_torchx::tf32::Tf32;
use blip2_torchx::{Error, memory, process, rng};
use tch::{Cuda, Device, Kind, Tensor};

/// Tests of process-wide state (generators, switches, allocator figures) run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn the_cpu_can_always_be_had_and_has_a_name() {
    assert_eq!(device::select(DeviceChoice::Cpu).unwrap(), Device::Cpu);
    assert!(!device::name(Device::Cpu).is_empty());
    device::set_current(Device::Cpu);
    device::synchronize(Device::Cpu);
}

#[test]
fn auto_takes_cuda_where_it_is_and_names_that_are_not_there_are_errors() {
    let loaded = device::load_cuda();
    assert_eq!(loaded, device::load_cuda());
    if Cuda::is_available() {
        assert_eq!(device::select(DeviceChoice::Auto).unwrap(), Device::Cuda(0));
        let error = device::select(DeviceChoice::Cuda(Some(4096))).unwrap_err();
        assert!(matches!(error, Error::NoSuchCudaDevice { requested: 4096, .. }), "{error}");
    } else {
        assert_eq!(device::select(DeviceChoice::Auto).unwrap(), Device::Cpu);
        let error = device::select(DeviceChoice::Cuda(Some(1))).unwrap_err();
        assert!(matches!(error, Error::NoCuda { .. }));
        assert!(error.to_string().contains("cuda:1"), "{error}");
    }
}

#[test]
fn a_generator_begun_anew_repeats_its_numbers() {
    let _alone = alone();
    assert_begun_anew_repeats(Device::Cpu);
}

#[test]
fn sdpa_switches_hold_and_steer_the_choice_of_kernel() {
    let _alone = alone();
    const MATH: i64 = 0;
    let before = Backends::get();
    let q = Tensor::rand([1, 2, 8, 16], (Kind::Float, Device::Cpu));
    let choice = || Tensor::internal_fused_sdp_choice(&q, &q, &q, None::<&Tensor>, 0.0, false, None, false);
    let math_only = Backends { flash: false, efficient: false, math: true, cudnn: false };
    math_only.set();
    assert_eq!(Backends::get(), math_only);
    assert_eq!(choice(), MATH);
    Backends { flash: true, ..math_only }.set();
    assert_ne!(choice(), MATH);
    before.set();
    assert_eq!(Backends::get(), before);
}

#[test]
fn fp32_on_a_gpu_is_tf32_in_convolutions_until_that_is_forbidden() {
    let _alone = alone();
    let before = Tf32::get();
    assert!(before.convolutions, "libtorch's default, which Tf32::OFF is there for");
    for switches in [Tf32::OFF, Tf32 { products: true, ..Tf32::OFF }, Tf32 { convolutions: true, ..Tf32::OFF }] {
        switches.set();
        assert_eq!(Tf32::get(), switches);
    }
    before.set();
    assert_eq!(Tf32::get(), before);
}

#[test]
fn the_loaded_libtorch_says_its_version() {
    assert_eq!(process::libtorch_version(), "2.11.0");
}

#[test]
fn memory_figures_follow_a_tensor() {
    let _alone = alone();
    assert!(memory::stats(Device::Cpu).is_none());
    let peak = memory::peak_rss_bytes().unwrap();
    assert!(peak > 1 << 20);
    if !cuda_is_here() {
        return;
    }
    let device = Device::Cuda(0);
    memory::reset_peak(device);
    let before = memory::stats(device).unwrap();
    let tensor = Tensor::zeros([1 << 20], (Kind::Float, device));
    let during = memory::stats(device).unwrap();
    assert!(during.allocated_bytes >= before.allocated_bytes + (4 << 20));
    drop(tensor);
    let after = memory::stats(device).unwrap();
    assert_eq!(after.allocated_bytes, before.allocated_bytes);
    assert!(after.peak_allocated_bytes >= during.allocated_bytes);
}

#[test]
fn a_cuda_generator_begun_anew_repeats_its_numbers() {
    let _alone = alone();
    if !cuda_is_here() {
        return;
    }
    let device = Device::Cuda(0);
    assert_begun_anew_repeats(device);
    assert!(!device::name(device).starts_with("cuda:"));
    device::synchronize(device);
}

fn assert_begun_anew_repeats(device: Device) {
    let [first, other, again] = [3, 4, 3].map(|seed| {
        rng::seed(device, seed).unwrap();
        let numbers = Tensor::rand([64], (Kind::Float, device));
        assert!(!numbers.equal(&Tensor::rand([64], (Kind::Float, device))), "numbers go on");
        assert_eq!(rng::current_seed(device).unwrap(), seed);
        numbers
    });
    assert!(first.equal(&again) && !first.equal(&other));
}

fn cuda_is_here() -> bool {
    device::load_cuda();
    let here = Cuda::is_available();
    if !here {
        eprintln!("skipped: no CUDA device");
    }
    here
}
