//! Parity with the reference implementations on the golden cases: LAVIS' stage 1, transformers' stage 2.
//!
//! Losses within 1e-5 relative, each gradient within 1e-4 (2-norm of the difference over that of the reference), fp32.

use std::path::{Path, PathBuf};

use blip2_torchx::params::TensorSource;
use blip2_trainer::config::{Precision, Stage};
use blip2_trainer::ranks::Alone;
use blip2_trainer::replay::{ReplayOptions, replay};
use blip2_weights::SafetensorsFile;
use tch::{Device, Kind, Tensor};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a - b)) / norm(b).max(1e-30)
}

fn check(name: &str, stage: Stage) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let dir = case(name);
    let options = ReplayOptions {
        model: (&dir).into(),
        stage,
        batch: dir.join("batch.safetensors"),
        out: out.clone(),
        precision: Precision::Fp32,
        device: Device::Cpu,
    };
    replay(&options, &Alone).unwrap_or_else(|e| panic!("{e}"));
    let ours = SafetensorsFile::open(&out).unwrap();
    let theirs = SafetensorsFile::open(&dir.join("expected.safetensors")).unwrap();
    let mut gradients = 0;
    for (key, _) in theirs.entries() {
        let (expected, got) = (theirs.read(&key).unwrap(), ours.read(&key).unwrap_or_else(|e| panic!("{key}: {e}")));
        let tolerance = if key.starts_with("grad/") { 1e-4 } else { 1e-5 };
        gradients += usize::from(key.starts_with("grad/"));
        let error = relative(&got, &expected);
        // A gradient that is zero by mathematics (a key's bias) is rounding noise on both sides.
        let noise = expected.norm().double_value(&[]) < 1e-6 && got.norm().double_value(&[]) < 1e-6;
        assert!(error <= tolerance || noise, "{key}: {error:e}");
    }
    assert!(gradients > 50, "{gradients} gradients compared");
}

#[test]
fn stage1_equals_lavis() {
    check("stage1", Stage::One);
}

#[test]
fn stage2_equals_transformers_with_llama() {
    check("stage2_llama", Stage::Two);
}

#[test]
fn stage2_equals_transformers_with_opt() {
    check("stage2_opt", Stage::Two);
}

#[test]
fn stage2_equals_transformers_with_t5() {
    check("stage2_t5", Stage::Two);
}
