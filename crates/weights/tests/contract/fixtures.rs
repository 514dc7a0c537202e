//! Files and tensors that several tests need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blip2_torchx::params::{Init, ParamStore, TensorSource};
use blip2_weights::save_safetensors;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// A golden case's directory.
pub fn golden(case: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(case)
}

/// A file that `scripts/fixtures/torch_files.py` made.
pub fn torch_fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/torch_files")).join(name)
}

/// A safetensors file with this header text and these data.
pub fn write_raw(path: &Path, header: &[u8], data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

/// A tensor whose values tell its name and place.
pub fn numbered(name: &str, shape: &[i64]) -> Tensor {
    let elements: i64 = shape.iter().product();
    let seed = name.bytes().fold(7i64, |hash, byte| (hash * 31 + i64::from(byte)) % 9973);
    (Tensor::arange(elements, (Kind::Float, Device::Cpu)) + seed).reshape(shape)
}

/// Named tensors of those shapes.
pub fn tensors(shapes: &[(&str, &[i64])]) -> Vec<(String, Tensor)> {
    shapes.iter().map(|(name, shape)| (name.to_string(), numbered(name, shape))).collect()
}

/// Those as a source in memory.
pub fn source(shapes: &[(&str, &[i64])]) -> BTreeMap<String, Tensor> {
    tensors(shapes).into_iter().collect()
}

/// A trainable store of zeros with those names and shapes.
pub fn store(shapes: &[(&str, &[i64])]) -> ParamStore {
    let store = ParamStore::trainable(Device::Cpu);
    for (name, shape) in shapes {
        let _ = store.root().param(name, shape, Init::Zeros);
    }
    store
}

/// A model directory.
pub fn write_model(directory: &Path, config: &Value, shapes: &[(&str, &[i64])]) {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    save_safetensors(&tensors(shapes), &BTreeMap::new(), &directory.join("model.safetensors")).unwrap();
}

/// The names of a source, sorted.
pub fn names(source: &dyn TensorSource) -> Vec<String> {
    let mut names: Vec<String> = source.entries().into_iter().map(|(name, _)| name).collect();
    names.sort();
    names
}

/// Whether two tensors have one dtype, one shape and the same bits.
pub fn identical(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && a.size() == b.size() && bytes(a) == bytes(b)
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// The message of an error, which must be one line.
pub fn line<T>(result: Result<T, blip2_weights::WeightsError>) -> String {
    let message = result.err().expect("an error").to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}
