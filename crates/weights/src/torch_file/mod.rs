//! Files of `torch.save` (`.bin`, `.pth`, `.pt`), read without executing anything.
//!
//! Such a file is a pickle, a program that builds objects, with the numbers of its tensors beside it. `machine` runs the part of that
//! language that writes data and refuses by name all that would call code; `archive`, `legacy` and `tar` find the numbers in the three
//! formats that PyTorch has had; `contents` checks that each tensor lies inside the file. Afterwards a tensor is a range of the mapped file,
//! copied once when asked for.

mod archive;
mod calls;
mod contents;
mod legacy;
mod machine;
mod problem;
mod reader;
mod tar;
mod tree;
mod value;
mod writer;
mod zip;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2_torchx::mapped_file::MappedFile;
use blip2_torchx::params::{TensorInfo, TensorSource};
use tch::Tensor;

pub use problem::TorchFileProblem;
pub(crate) use writer::{Entry, write_torch_file};

use crate::error::WeightsError;
use crate::file_map::map_file;
use contents::StoredTensor;
use tree::Tree;

/// A PyTorch file whose tensors are read from the mapping when asked for.
///
/// Its tensors are those of the dictionary it holds, or of the one under `model`, `state_dict` or `module`; a nested dictionary's have
/// dotted names.
pub struct TorchFile {
    path: PathBuf,
    mapped: MappedFile,
    tree: Tree,
}

impl TorchFile {
    /// Maps the file, reads its pickle and checks every tensor: afterwards each lies inside the file.
    ///
    /// # Errors
    /// No such file, a Git LFS pointer; whatever is in [`TorchFileProblem`].
    pub fn open(path: &Path) -> Result<TorchFile, WeightsError> {
        let problem = |problem| WeightsError::TorchFile { path: path.to_path_buf(), problem };
        let mapped = map_file(path)?;
        let contents = if zip::is_zip(&mapped) {
            archive::read(&mapped)
        } else if legacy::is_pickle(&mapped) {
            legacy::read(&mapped)
        } else if tar::is_tar(&mapped) {
            tar::read(&mapped)
        } else {
            Err(TorchFileProblem::Unknown)
        };
        let tree = contents.and_then(|contents| tree::read(&contents)).map_err(problem)?;
        Ok(TorchFile { path: path.to_path_buf(), mapped, tree })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Numbers and short texts that stand beside the model's dictionary, as `epoch`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.tree.scalars
    }

    /// Tensors outside the model's dictionary, as an optimizer's moments, by their dotted path.
    pub fn beside(&self) -> impl Iterator<Item = (&str, TensorInfo)> {
        self.tree.beside.iter().map(|(name, tensor)| (name.as_str(), tensor.info()))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tree.tensors.keys().map(String::as_str)
    }
}

impl TensorSource for TorchFile {
    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        self.tree.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.info())).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let stored = self.tree.tensors.get(name).ok_or("no such tensor")?;
        let StoredTensor { kind, shape, strides, offset, contiguous } = stored;
        let tensor = if *contiguous {
            let bytes = stored.bytes();
            self.mapped.tensor(*offset, bytes, *kind, shape)
        } else {
            self.mapped.strided_tensor(*offset, *kind, shape, strides)
        };
        tensor.map_err(|error| error.to_string())
    }
}
