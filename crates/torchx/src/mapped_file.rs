//! Files mapped into memory for their headers, and read by position for their tensors.
//!
//! A tensor's bytes go from the page cache straight into the memory of the tensor that keeps them. Copying out of the map instead would count
//! every page of the file as this process's own.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use memmap2::Mmap;
use rustix::mm::{Advice, madvise};
use tch::{Device, Kind, Tensor};

use crate::error::Error;

/// From this size on a tensor is read by several threads, into huge pages where the system has them: page faults cost as much as the copy.
const LARGE: usize = 4 << 20;
/// More threads than this do not fill memory faster.
const MAX_READERS: usize = 8;
const HUGE_PAGE: usize = 2 << 20;

/// A file's bytes, mapped read-only.
///
/// The file must not be cut short by another process while it is mapped: looking beyond its new end kills the program.
/// Writers that replace files by rename, as ours do, are safe.
pub struct MappedFile {
    map: Mmap,
    file: File,
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
        Ok(Self { map, file })
    }

    /// Reads a little-endian, row-major tensor out of the file.
    ///
    /// # Shapes
    /// returns: `shape`, on the CPU, with memory of its own.
    ///
    /// # Errors
    /// [`Error::TensorOutOfFile`] where the bytes lie outside the file or are not as many as the shape needs; the system's refusal.
    pub fn tensor(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Result<Tensor, Error> {
        self.check(offset, len, kind, shape)?;
        let tensor = Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(|error| Error::Torch {
            op: "allocate tensor",
            message: error.to_string().lines().next().unwrap_or_default().to_owned(),
        })?;
        self.fill(offset, len, &tensor)?;
        Ok(tensor)
    }

    /// Reads a little-endian, row-major tensor into one that is there: on the CPU, contiguous, of the dtype and size of what is read.
    ///
    /// # Errors
    /// As [`MappedFile::tensor`]; [`Error::NotFillable`] where `target` is not such a tensor.
    pub fn read_into(&self, offset: usize, len: usize, target: &Tensor) -> Result<(), Error> {
        self.check(offset, len, target.kind(), &target.size())?;
        if target.device() != Device::Cpu || !target.is_contiguous() {
            return Err(Error::NotFillable { device: target.device(), shape: target.size() });
        }
        self.fill(offset, len, target)
    }

    fn check(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Result<(), Error> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.map.len());
        if inside && byte_len(kind, shape) == Some(len) {
            return Ok(());
        }
        Err(Error::TensorOutOfFile { offset, len, file_len: self.map.len(), kind, shape: shape.to_vec() })
    }

    /// `tensor` is contiguous, on the CPU, and has exactly `len` bytes.
    fn fill(&self, offset: usize, len: usize, tensor: &Tensor) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the callers have checked where these bytes lie and how many they are; nobody else looks at a tensor that is being filled.
        let bytes = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), len) };
        let read = |part: &mut [u8], at: usize| {
            self.file.read_exact_at(part, at as u64).map_err(|source| Error::Read {
                offset: at,
                len: part.len(),
                source,
            })
        };
        if len < LARGE {
            return read(bytes, offset);
        }
        prefer_huge_pages(bytes);
        let readers = thread::available_parallelism().map_or(1, |n| n.get().min(MAX_READERS));
        let share = len.div_ceil(readers).next_multiple_of(HUGE_PAGE);
        thread::scope(|scope| {
            let parts: Vec<_> = bytes
                .chunks_mut(share)
                .enumerate()
                .map(|(i, part)| scope.spawn(move || read(part, offset + i * share)))
                .collect();
            parts.into_iter().try_for_each(|part| part.join().expect("a reading thread does not panic"))
        })
    }
}

/// Asks for huge pages below memory that is about to be written for the first time. It is a wish: a refusal changes nothing.
fn prefer_huge_pages(bytes: &mut [u8]) {
    let skip = bytes.as_ptr().align_offset(HUGE_PAGE);
    let whole = bytes.len().saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: the range lies inside `bytes`, and this advice does not change what it holds.
        let _ = unsafe { madvise(bytes[skip..].as_mut_ptr().cast(), whole, Advice::LinuxHugepage) };
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
