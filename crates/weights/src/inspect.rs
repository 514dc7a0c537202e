//! What a path holds.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use blip2_torchx::params::{TensorInfo, TensorSource};
use serde::Serialize;
use serde_json::Value;
use tch::Kind;

use crate::directory::{ModelDir, ModelKind};
use crate::error::WeightsError;
use crate::header::dtype_of;
use crate::json_file::{read_error, read_object};
use crate::load_report::top_part;
use crate::save::stored_bytes;
use crate::weights_dir::WeightsDir;
use crate::weights_file::WeightsFile;

/// What a file or directory of weights holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The path asked for.
    pub path: PathBuf,
    /// What it is.
    pub contents: Contents,
    /// Strings and numbers beside the tensors: the files' own metadata, a checkpoint's state, a model's architecture.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors by file, part and dtype.
    pub groups: Vec<TensorGroup>,
}

/// Kinds of paths with weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// One safetensors file.
    SafetensorsFile,
    /// One file of `torch.save`.
    TorchFile,
    /// A whole BLIP-2 in Hugging Face layout.
    Blip2Directory,
    /// A tower in Hugging Face layout.
    TowerDirectory,
    /// A training checkpoint.
    Checkpoint,
}

/// Tensors of one file and dtype below one top-level name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorGroup {
    /// The file's name.
    pub file: String,
    /// The first component of the tensors' names.
    pub part: String,
    /// Their dtype.
    pub dtype: String,
    /// How many there are.
    pub tensors: u64,
    /// How many numbers they hold.
    pub parameters: u64,
    /// How many bytes they take.
    pub bytes: u64,
}

/// Looks into a safetensors file, a file of `torch.save`, a Hugging Face directory or a checkpoint. Only headers are read, and nothing of a
/// pickle is executed.
///
/// # Errors
/// Whatever opening the path finds.
pub fn inspect(path: &Path) -> Result<Inspection, WeightsError> {
    let attributes = path.metadata().map_err(|source| read_error(path, source))?;
    let mut found = Inspection {
        path: path.to_path_buf(),
        contents: Contents::SafetensorsFile,
        metadata: BTreeMap::new(),
        groups: Vec::new(),
    };
    if !attributes.is_dir() {
        let file = WeightsFile::open(path)?;
        if matches!(file, WeightsFile::Torch(_)) {
            found.contents = Contents::TorchFile;
        }
        found.add(&file);
    } else if path.join("state.json").exists() || !path.join("config.json").exists() {
        found.contents = Contents::Checkpoint;
        WeightsDir::open(path)?.files().iter().for_each(|file| found.add(file));
        let (optimizer, state) = (path.join("optimizer.safetensors"), path.join("state.json"));
        if optimizer.exists() {
            found.add(&WeightsFile::open(&optimizer)?);
        }
        if state.exists() {
            found.add_scalars(&read_object(&state)?);
        }
    } else {
        let model = ModelDir::open(path)?;
        found.contents =
            if model.kind() == &ModelKind::WholeBlip2 { Contents::Blip2Directory } else { Contents::TowerDirectory };
        found.add_scalars(model.config());
        model.weights().files().iter().for_each(|file| found.add(file));
    }
    Ok(found)
}

impl Inspection {
    /// Tensors, parameters and bytes over all groups.
    pub fn totals(&self) -> (u64, u64, u64) {
        let sum = |count: fn(&TensorGroup) -> u64| self.groups.iter().map(count).sum();
        (sum(|g| g.tensors), sum(|g| g.parameters), sum(|g| g.bytes))
    }

    fn add(&mut self, file: &WeightsFile) {
        let name = file.name();
        let mut groups: BTreeMap<(String, String), TensorGroup> = BTreeMap::new();
        let mut count = |tensor: &str, info: &TensorInfo| {
            let (part, dtype) = (top_part(tensor).to_string(), dtype_label(info.kind));
            let group = groups.entry((part.clone(), dtype.clone())).or_insert_with(|| TensorGroup {
                file: name.clone(),
                part,
                dtype,
                tensors: 0,
                parameters: 0,
                bytes: 0,
            });
            group.tensors += 1;
            group.parameters += info.shape.iter().product::<i64>() as u64;
            group.bytes += stored_bytes(info);
        };
        file.entries().iter().for_each(|(tensor, info)| count(tensor, info));
        if let WeightsFile::Torch(file) = file {
            file.beside().for_each(|(tensor, info)| count(tensor, &info));
        }
        self.groups.extend(groups.into_values());
        self.metadata.extend(file.metadata().iter().map(|(key, value)| (format!("{name}: {key}"), value.clone())));
    }

    /// Keeps what fits a line: strings, numbers, truth values, and lists of such.
    fn add_scalars(&mut self, object: &Value) {
        for (key, value) in object.as_object().into_iter().flatten() {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Number(_) | Value::Bool(_) => value.to_string(),
                Value::Array(items) if items.len() <= 8 && !items.iter().any(|i| i.is_object() || i.is_array()) => {
                    value.to_string()
                }
                _ => continue,
            };
            self.metadata.insert(key.clone(), text);
        }
    }
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Contents::SafetensorsFile => "safetensors file",
            Contents::TorchFile => "PyTorch file",
            Contents::Blip2Directory => "BLIP-2 model",
            Contents::TowerDirectory => "model of a single tower",
            Contents::Checkpoint => "checkpoint",
        })
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.path.display(), self.contents)?;
        for (key, value) in &self.metadata {
            writeln!(f, "  {key}: {value}")?;
        }
        let header = ["file", "part", "dtype", "tensors", "parameters", "MiB"].map(String::from);
        let row = |file: &str, part: &str, dtype: &str, (tensors, parameters, bytes): (u64, u64, u64)| {
            let mib = format!("{:.1}", bytes as f64 / f64::from(1 << 20));
            [file.into(), part.into(), dtype.into(), tensors.to_string(), grouped(parameters), mib]
        };
        let rows = self.groups.iter().map(|g| row(&g.file, &g.part, &g.dtype, (g.tensors, g.parameters, g.bytes)));
        let table: Vec<[String; 6]> =
            [header].into_iter().chain(rows).chain([row("total", "", "", self.totals())]).collect();
        let widths: [usize; 6] = std::array::from_fn(|i| table.iter().map(|row| row[i].len()).max().unwrap_or(0));
        let lines = table.iter().map(|row| {
            let cell = |i: usize| {
                if i < 3 { format!("{:<w$}", row[i], w = widths[i]) } else { format!("{:>w$}", row[i], w = widths[i]) }
            };
            (0..row.len()).map(cell).collect::<Vec<_>>().join("  ")
        });
        f.write_str(&lines.collect::<Vec<_>>().join("\n"))
    }
}

/// A dtype as safetensors calls it, where it has a name for it.
fn dtype_label(kind: Kind) -> String {
    dtype_of(kind).map_or_else(|| format!("{kind:?}"), |dtype| dtype.to_string())
}

/// Digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group));
    groups.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn digits_come_in_threes() {
        assert_eq!([0, 999, 1000, 186_705_470].map(grouped), ["0", "999", "1,000", "186,705,470"]);
    }
}
