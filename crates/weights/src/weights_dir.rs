//! The weights of a directory: one file, or shards with an index, and the pre-training heads beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use blip2_torchx::params::{TensorInfo, TensorSource};
use serde_json::Value;
use tch::Tensor;

use crate::error::WeightsError;
use crate::json_file::{describe, read_object};
use crate::weights_file::WeightsFile;

pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// What stage 1 trains and `transformers` has no name for lies here, so that it finds no key that it does not know.
pub(crate) const HEADS_FILE: &str = "pretraining_heads.safetensors";
/// A directory's weights in the order in which `transformers` looks for them: a file, or else the index of its shards.
pub const WEIGHT_FILES: [(&str, &str); 2] =
    [(WEIGHTS_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json")];

/// `model.safetensors`, `pytorch_model.bin`, or the shards of either's index, with `pretraining_heads.safetensors` where it exists, as one
/// source of tensors. A checkpoint's directory is read by this as well.
pub struct WeightsDir {
    path: PathBuf,
    files: Vec<WeightsFile>,
    /// Each tensor's file, as an index into `files`.
    places: BTreeMap<String, usize>,
}

impl WeightsDir {
    /// Opens and checks all files. As in `transformers`, safetensors go before PyTorch's format, and a single file before an index.
    ///
    /// # Errors
    /// No weights; a shard that the index names and that is not there; a tensor of a shard that the index does not name; a tensor in two files;
    /// whatever [`WeightsFile::open`] finds.
    pub fn open(path: &Path) -> Result<WeightsDir, WeightsError> {
        if path.is_file() {
            return Err(WeightsError::FileForDirectory { path: path.to_path_buf() });
        }
        if !path.is_dir() {
            return Err(WeightsError::NotFound { path: path.to_path_buf() });
        }
        let found = WEIGHT_FILES.iter().flat_map(|(file, index)| [*file, *index]).find(|name| path.join(name).exists());
        let mut files = match found {
            None => return Err(WeightsError::NoWeights { path: path.to_path_buf(), hint: hint(path) }),
            Some(index) if index.ends_with(".json") => open_shards(path, &path.join(index))?,
            Some(file) => vec![WeightsFile::open(&path.join(file))?],
        };
        if path.join(HEADS_FILE).exists() {
            files.push(WeightsFile::open(&path.join(HEADS_FILE))?);
        }
        WeightsDir::of(path, files)
    }

    /// Files as one source.
    ///
    /// # Errors
    /// A tensor in two files.
    pub(crate) fn of(path: &Path, files: Vec<WeightsFile>) -> Result<WeightsDir, WeightsError> {
        let mut places = BTreeMap::new();
        for (place, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = places.insert(name.to_string(), place) {
                    return Err(WeightsError::RepeatedTensor {
                        path: path.to_path_buf(),
                        name: name.to_string(),
                        first: files[first].name(),
                        second: file.name(),
                    });
                }
            }
        }
        Ok(WeightsDir { path: path.to_path_buf(), files, places })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, in the order of the index, the pre-training heads last.
    pub fn files(&self) -> &[WeightsFile] {
        &self.files
    }

    /// Whether it holds a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }
}

impl TensorSource for WeightsDir {
    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        self.files.iter().flat_map(TensorSource::entries).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let place = self.places.get(name).ok_or("no such tensor")?;
        self.files[*place].read(name)
    }

    fn read_into(&self, name: &str, target: &mut Tensor) -> Result<(), String> {
        let place = self.places.get(name).ok_or("no such tensor")?;
        self.files[*place].read_into(name, target)
    }
}

/// The shards that an index names, each with the tensors that it places there.
///
/// # Errors
/// A file that is no index; one that names no shard, or something that cannot lie beside it.
pub fn read_shard_index(index: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, WeightsError> {
    let value = read_object(index)?;
    let wrong = |key: String, expected: &str, got: String| WeightsError::Key {
        path: index.to_path_buf(),
        key,
        expected: expected.into(),
        got,
    };
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("weight_map".into(), "an object", describe(value.get("weight_map"))))?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, place) in map {
        let wrong = || wrong(format!("weight_map.{name}"), "a file name", describe(Some(place)));
        let shard = place.as_str().ok_or_else(wrong)?;
        // A name with separators could read any file of the machine.
        let mut components = Path::new(shard).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            return Err(WeightsError::ShardName { index: index.to_path_buf(), shard: shard.into() });
        }
        shards.entry(shard.to_owned()).or_default().insert(name.clone());
    }
    if shards.is_empty() {
        return Err(wrong("weight_map".into(), "shards", "none".into()));
    }
    Ok(shards)
}

fn open_shards(directory: &Path, index: &Path) -> Result<Vec<WeightsFile>, WeightsError> {
    let mut files = Vec::new();
    for (shard, names) in read_shard_index(index)? {
        let path = directory.join(&shard);
        if !path.exists() {
            return Err(WeightsError::ShardMissing { index: index.to_path_buf(), shard });
        }
        let file = WeightsFile::open(&path)?;
        let held: BTreeSet<&str> = file.names().into_iter().collect();
        // An index may list more: tied tensors that a later conversion has dropped from the shards. What a model needs of it, its audit misses.
        if let Some(name) = held.iter().find(|name| !names.contains(**name)) {
            return Err(WeightsError::IndexLacks { index: index.to_path_buf(), name: name.to_string(), shard });
        }
        files.push(file);
    }
    Ok(files)
}

fn hint(directory: &Path) -> String {
    let other = ["model.onnx", "tf_model.h5", "flax_model.msgpack"];
    match other.iter().find(|file| directory.join(file).exists()) {
        Some(file) => format!("; {file} must first be saved as safetensors"),
        None => String::new(),
    }
}
