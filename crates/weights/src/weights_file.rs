//! One file of weights, in either format.

use std::collections::BTreeMap;
use std::path::Path;

use blip2_torchx::params::{TensorInfo, TensorSource};
use tch::Tensor;

use crate::error::WeightsError;
use crate::safetensors_file::SafetensorsFile;
use crate::torch_file::TorchFile;

/// A safetensors file or a file of `torch.save`.
pub enum WeightsFile {
    /// Hugging Face's format.
    Safetensors(SafetensorsFile),
    /// PyTorch's.
    Torch(TorchFile),
}

impl WeightsFile {
    /// Opens a file in the format that its name tells: `.safetensors`, and else PyTorch's.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`] and [`TorchFile::open`].
    pub fn open(path: &Path) -> Result<WeightsFile, WeightsError> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            SafetensorsFile::open(path).map(WeightsFile::Safetensors)
        } else {
            TorchFile::open(path).map(WeightsFile::Torch)
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        match self {
            WeightsFile::Safetensors(file) => file.path(),
            WeightsFile::Torch(file) => file.path(),
        }
    }

    /// Its name without folders.
    pub(crate) fn name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// What its writer left beside the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        match self {
            WeightsFile::Safetensors(file) => file.metadata(),
            WeightsFile::Torch(file) => file.metadata(),
        }
    }

    /// Its tensors' names, sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            WeightsFile::Safetensors(file) => file.names().collect(),
            WeightsFile::Torch(file) => file.names().collect(),
        }
    }
}

impl TensorSource for WeightsFile {
    fn origin(&self) -> String {
        self.path().display().to_string()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        match self {
            WeightsFile::Safetensors(file) => file.entries(),
            WeightsFile::Torch(file) => file.entries(),
        }
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        match self {
            WeightsFile::Safetensors(file) => file.read(name),
            WeightsFile::Torch(file) => file.read(name),
        }
    }

    fn read_into(&self, name: &str, target: &mut Tensor) -> Result<(), String> {
        match self {
            WeightsFile::Safetensors(file) => file.read_into(name, target),
            WeightsFile::Torch(file) => file.read_into(name, target),
        }
    }
}
