//! Writing safetensors: deterministic bytes, one tensor in memory at a time.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use blip2_torchx::params::{TensorInfo, TensorSource};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use crate::error::WeightsError;
use crate::header::dtype_of;
use crate::staging::write_file;

/// Elements per copy out of libtorch's memory: at most 16 MiB on our side, whatever the tensor's size.
const CHUNK_ELEMENTS: i64 = 1 << 21;
/// The data begin at a multiple of this, so that a reader can map every dtype.
const ALIGNMENT: usize = 8;

/// Writes tensors to `path`: beside it first, synced, then renamed, so that `path` is always a whole file.
///
/// # Errors
/// A name that appears twice, a dtype that the format lacks, or the system's refusal to write.
pub fn save_safetensors(
    entries: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
    path: &Path,
) -> Result<(), WeightsError> {
    let source = in_memory(entries)?;
    let names: Vec<String> = source.keys().cloned().collect();
    write_file(path, |file| write_safetensors(&source, &names, metadata, file, path))
}

/// Writes those tensors of `source` that `names` lists to `out`; `path` is for messages.
///
/// The bytes depend on names, values and metadata alone: widest dtype first (which keeps every tensor aligned), then by name.
///
/// # Errors
/// As [`save_safetensors`]; a name that the source lacks.
pub fn write_safetensors(
    source: &dyn TensorSource,
    names: &[String],
    metadata: &BTreeMap<String, String>,
    out: &mut dyn Write,
    path: &Path,
) -> Result<(), WeightsError> {
    let infos: BTreeMap<String, TensorInfo> = source.entries().into_iter().collect();
    let failed = |name: &str, message: String| WeightsError::Tensor { name: name.to_string(), message };
    let mut tensors = Vec::new();
    for name in names {
        let info = infos.get(name).ok_or_else(|| failed(name, format!("not in {}", source.origin())))?;
        tensors.push((name.as_str(), info));
    }
    tensors.sort_by_key(|(name, info)| (Reverse(info.kind.elt_size_in_bytes()), *name));

    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0u64;
    for (name, info) in &tensors {
        let dtype = dtype_of(info.kind).ok_or_else(|| failed(name, format!("safetensors has no {:?}", info.kind)))?;
        let end = offset + stored_bytes(info);
        let entry = json!({"dtype": dtype.to_string(), "shape": info.shape, "data_offsets": [offset, end]});
        if header.insert(name.to_string(), entry).is_some() {
            return Err(failed(name, "its name appears twice".into()));
        }
        offset = end;
    }
    let write_error = |source: io::Error| WeightsError::Write { path: path.to_path_buf(), source };
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    out.write_all(&(text.len() as u64).to_le_bytes()).map_err(write_error)?;
    out.write_all(&text).map_err(write_error)?;

    let mut buffer = Vec::new();
    for (name, info) in &tensors {
        let tensor = source.read(name).map_err(|message| failed(name, message))?;
        if tensor.kind() != info.kind || tensor.size() != info.shape {
            return Err(failed(name, format!("expected {info:?}, got {:?} {:?}", tensor.kind(), tensor.size())));
        }
        write_tensor(&tensor, &mut buffer, out).map_err(|error| match error {
            CopyError::Torch(error) => failed(name, error.to_string()),
            CopyError::Io(error) => write_error(error),
        })?;
    }
    Ok(())
}

/// Tensors in memory as a source; a name that appears twice is an error.
pub(crate) fn in_memory(entries: &[(String, Tensor)]) -> Result<BTreeMap<String, Tensor>, WeightsError> {
    let mut source = BTreeMap::new();
    for (name, tensor) in entries {
        if source.insert(name.clone(), tensor.shallow_clone()).is_some() {
            let message = "its name appears twice".to_string();
            return Err(WeightsError::Tensor { name: name.clone(), message });
        }
    }
    Ok(source)
}

/// How many bytes a tensor takes in a file.
pub(crate) fn stored_bytes(info: &TensorInfo) -> u64 {
    let elements: i64 = info.shape.iter().product();
    elements as u64 * info.kind.elt_size_in_bytes() as u64
}

/// Why a tensor's bytes did not reach the file.
pub(crate) enum CopyError {
    Torch(tch::TchError),
    Io(io::Error),
}

impl From<tch::TchError> for CopyError {
    fn from(error: tch::TchError) -> CopyError {
        CopyError::Torch(error)
    }
}

/// Writes a tensor's bytes, row-major, in parts through `buffer`.
pub(crate) fn write_tensor(tensor: &Tensor, buffer: &mut Vec<u8>, out: &mut dyn Write) -> Result<(), CopyError> {
    let flat = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?.f_view([-1])?;
    let (elements, width) = (flat.size1()?, flat.kind().elt_size_in_bytes());
    let mut start = 0;
    while start < elements {
        let count = CHUNK_ELEMENTS.min(elements - start);
        buffer.resize(count as usize * width, 0);
        flat.f_narrow(0, start, count)?.f_copy_data_u8(buffer, count as usize)?;
        out.write_all(buffer).map_err(CopyError::Io)?;
        start += count;
    }
    Ok(())
}
