//! One safetensors file, mapped into memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2_torchx::mapped_file::MappedFile;
use blip2_torchx::params::{TensorInfo, TensorSource, copy_values};
use tch::{Device, Tensor};

use crate::error::WeightsError;
use crate::file_map::map_file;
use crate::header::{self, Header};

/// A safetensors file whose tensors are read from the mapping when asked for.
pub struct SafetensorsFile {
    path: PathBuf,
    mapped: MappedFile,
    header: Header,
}

impl SafetensorsFile {
    /// Maps the file and checks its whole header: afterwards every tensor lies inside the file and has a dtype that libtorch knows.
    ///
    /// # Errors
    /// No such file, a Git LFS pointer, a truncated file, a damaged or hostile header, an unsupported dtype.
    pub fn open(path: &Path) -> Result<SafetensorsFile, WeightsError> {
        let mapped = map_file(path)?;
        let problem = |problem| WeightsError::Header { path: path.to_path_buf(), problem };
        let header = header::parse(&mapped).map_err(problem)?;
        for (name, stored) in &header.tensors {
            if header::kind_of(stored.dtype).is_none() {
                return Err(WeightsError::Dtype {
                    path: path.to_path_buf(),
                    name: name.clone(),
                    dtype: stored.dtype.to_string(),
                });
            }
        }
        Ok(SafetensorsFile { path: path.to_path_buf(), mapped, header })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The strings that the file's writer left beside the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }
}

impl TensorSource for SafetensorsFile {
    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        let tensors = self.header.tensors.iter();
        tensors
            .filter_map(|(name, stored)| {
                let kind = header::kind_of(stored.dtype)?;
                Some((name.clone(), TensorInfo { kind, shape: stored.shape.clone() }))
            })
            .collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let stored = self.header.tensors.get(name).ok_or("no such tensor")?;
        let kind = header::kind_of(stored.dtype).ok_or("unsupported dtype")?;
        self.mapped.tensor(stored.offset, stored.bytes, kind, &stored.shape).map_err(|error| error.to_string())
    }

    fn read_into(&self, name: &str, target: &mut Tensor) -> Result<(), String> {
        let stored = self.header.tensors.get(name).ok_or("no such tensor")?;
        let fits = header::kind_of(stored.dtype) == Some(target.kind()) && stored.shape == target.size();
        if fits && target.device() == Device::Cpu && target.is_contiguous() {
            return self.mapped.read_into(stored.offset, stored.bytes, target).map_err(|error| error.to_string());
        }
        copy_values(&self.read(name)?, target)
    }
}
