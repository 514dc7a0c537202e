//! What a checkpoint holds, out of a run and back into it.

use std::collections::BTreeMap;

use blip2_torchx::adamw::AdamW;
use blip2_torchx::grad_scaler::GradScaler;
use blip2_torchx::params::{LoadPlan, ParamStore, TensorSource};
use blip2_weights::{SafetensorsFile, WeightsError, write_safetensors};
use serde_json::Value;
use tch::{Device, Tensor, no_grad};

use crate::checkpoint::{Checkpoint, CheckpointError, CheckpointFolder, Snapshot, TrainState};
use crate::error::Error;

/// Trainable weights.
const MODEL: &str = "model.safetensors";
/// Optimizer moments and, in fp16, the loss scale.
const OPTIMIZER: &str = "optimizer.safetensors";
/// The model's configuration in Hugging Face's form, so that a checkpoint can be opened like a model directory.
const CONFIG: &str = "config.json";

/// Copies all that a checkpoint holds; the returned closure writes it, on another thread.
pub fn snapshot(
    params: &ParamStore,
    adamw: &AdamW,
    scaler: &GradScaler,
    state: &TrainState,
    model: &Value,
) -> Snapshot {
    let weights = copies(params.entries().into_iter().map(|(n, t, _)| (n, t)));
    let scaler = if scaler.is_enabled() { scaler.state() } else { Vec::new() };
    let scaler = scaler.into_iter().map(|(n, t)| (format!("scaler.{n}"), t));
    let optimizer = copies(adamw.state().into_iter().chain(scaler));
    let (state, model) = (state.clone(), model.clone());
    Box::new(move |folder: &mut CheckpointFolder| {
        write(folder, MODEL, &weights)?;
        write(folder, OPTIMIZER, &optimizer)?;
        folder.file(CONFIG, |out| serde_json::to_writer_pretty(out, &model).map_err(std::io::Error::from))?;
        state.write(folder)
    })
}

/// Fills parameters, moments and loss scale from a checkpoint, strictly.
///
/// # Errors
/// Tensors that are missing, unexpected or misshapen.
pub fn restore(
    checkpoint: &Checkpoint,
    params: &ParamStore,
    adamw: &mut AdamW,
    scaler: &mut GradScaler,
) -> Result<TrainState, Error> {
    params.load(&SafetensorsFile::open(&checkpoint.file(MODEL))?, &LoadPlan::exact())?;
    let path = checkpoint.file(OPTIMIZER);
    let file = SafetensorsFile::open(&path)?;
    let get = |name: &str| file.read(name).ok();
    adamw.load_state(get)?;
    if scaler.is_enabled() {
        scaler.load_state(|name| get(&format!("scaler.{name}")))?;
    }
    Ok(TrainState::read(checkpoint)?)
}

fn copies(entries: impl Iterator<Item = (String, Tensor)>) -> BTreeMap<String, Tensor> {
    // On the CPU `to_device` alone would share memory with the parameter, which goes on changing.
    no_grad(|| entries.map(|(name, t)| (name, t.detach().to_device(Device::Cpu).copy())).collect())
}

fn write(folder: &mut CheckpointFolder, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<(), CheckpointError> {
    let names: Vec<String> = tensors.keys().cloned().collect();
    let path = folder.path_of(name);
    folder.file(name, |out| -> Result<(), WeightsError> {
        write_safetensors(tensors, &names, &BTreeMap::new(), out, &path)
    })
}
