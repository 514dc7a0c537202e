//! Files mapped into memory: weights are read from the page cache straight into tensors.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;
use tch::{Device, Kind, Tensor};

use crate::error::Error;

/// A file's bytes, mapped read-only.
///
/// The file must not be cut short by another process while it is mapped: reading beyond its new end kills the program.
/// Writers that replace files by rename, as ours do, are safe.
pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// The system's, as for a file that is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only; see the type's documentation for what other processes must not do.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map })
    }

    /// Copies a little-endian, row-major tensor out of the file.
    ///
    /// # Shapes
    /// returns: `shape`, on the CPU, with memory of its own.
    ///
    /// # Errors
    /// [`Error::TensorOutOfFile`] where the bytes lie outside the file or are not as many as the shape needs.
    pub fn tensor(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Result<Tensor, Error> {
        let out_of_file =
            || Error::TensorOutOfFile { offset, len, file_len: self.map.len(), kind, shape: shape.to_vec() };
        let bytes = offset.checked_add(len).and_then(|end| self.map.get(offset..end)).ok_or_else(out_of_file)?;
        if byte_len(kind, shape) != Some(len) {
            return Err(out_of_file());
        }
        let tensor = Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(|error| Error::Torch {
            op: "allocate tensor",
            message: error.to_string().lines().next().unwrap_or_default().to_owned(),
        })?;
        // SAFETY: the fresh tensor is contiguous and has exactly `len` bytes, as checked above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), tensor.data_ptr().cast::<u8>(), len) };
        Ok(tensor)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Bytes of a tensor; none where the shape is negative or the product does not fit.
fn byte_len(kind: Kind, shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(kind.elt_size_in_bytes(), |product, &dim| product.checked_mul(usize::try_from(dim).ok()?))
}
