//! Parity with the reference implementations on the golden cases: LAVIS' stage 1, transformers' stage 2.
//!
//! Losses within 1e-5 relative, each gradient within 1e-4 (2-norm of the difference over that of the reference), fp32.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2_torchx::params::TensorSource;
use blip2_torchx::tf32::Tf32;
use blip2_trainer::config::{Precision, Stage};
use blip2_trainer::ranks::Alone;
use blip2_trainer::replay::{ReplayOptions, replay};
use blip2_weights::{SafetensorsFile, save_safetensors};
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
    assert_eq!(Tf32::get(), Tf32::OFF, "fp32 is fp32 on a GPU too");
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

/// What `replay` says of the case's batch after a change.
fn refused(name: &str, stage: Stage, change: impl Fn(&mut BTreeMap<String, Tensor>)) -> String {
    let (folder, dir) = (tempfile::tempdir().unwrap(), case(name));
    let file = SafetensorsFile::open(&dir.join("batch.safetensors")).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        file.entries().into_iter().map(|(key, _)| (key.clone(), file.read(&key).unwrap())).collect();
    change(&mut tensors);
    let (batch, out) = (folder.path().join("batch.safetensors"), folder.path().join("out.safetensors"));
    let entries: Vec<(String, Tensor)> = tensors.into_iter().collect();
    save_safetensors(&entries, &BTreeMap::new(), &batch).unwrap();
    let options =
        ReplayOptions { model: dir.into(), stage, batch, out, precision: Precision::Fp32, device: Device::Cpu };
    replay(&options, &Alone).unwrap_err().to_string()
}

#[test]
fn a_batch_that_no_step_can_be_made_of_is_refused() {
    let stage1 = |change: fn(&mut BTreeMap<String, Tensor>)| refused("stage1", Stage::One, change);
    let message = stage1(|batch| drop(batch.get_mut("input_ids").unwrap().get(0).get(0).fill_(1 << 40)));
    assert!(message.contains("input_ids: expected ids from 0 to "), "{message}");
    let message = stage1(|batch| drop(batch.get_mut("attention_mask").unwrap().get(0).get(0).fill_(0)));
    assert!(message.contains("attention_mask: expected padding behind the text"), "{message}");
    let message = stage1(|batch| drop(batch.get_mut("attention_mask").unwrap().get(0).get(0).fill_(2)));
    assert!(message.contains("attention_mask: expected 0 and 1"), "{message}");
    let message = stage1(|batch| drop(batch.remove("negative_text_index").unwrap()));
    assert!(message.contains("negative_text_index: missing beside negative_image_index"), "{message}");
    let message = stage1(|batch| {
        batch.retain(|name, _| !name.starts_with("negative_"));
        batch.values_mut().for_each(|tensor| *tensor = tensor.narrow(0, 0, 1).contiguous());
    });
    assert!(message.contains("expected at least 2 samples"), "{message}");
    let message = stage1(|batch| {
        for name in ["input_ids", "attention_mask"] {
            let tensor = batch.get_mut(name).unwrap();
            *tensor = tensor.narrow(1, 0, 1).repeat([1, 4000]);
        }
    });
    assert!(message.contains("input_ids: expected at most ") && message.contains(", got 4000"), "{message}");
    let message = refused("stage2_llama", Stage::Two, |batch| drop(batch.remove("labels").unwrap()));
    assert!(message.contains("labels: missing"), "{message}");
}
