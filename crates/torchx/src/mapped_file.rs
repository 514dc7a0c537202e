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

use memmap2::{Mmap, UncheckedAdvice};
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
        filled(kind, shape, |values| self.fill(offset, values))
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
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the tensor is contiguous, on the CPU, and has exactly `len` bytes, as checked; the caller fills it and looks at nothing meanwhile.
        self.fill(offset, unsafe { std::slice::from_raw_parts_mut(target.data_ptr().cast::<u8>(), len) })
    }

    /// Gathers a little-endian tensor whose elements lie `strides` elements apart, the first at byte `offset`.
    ///
    /// # Shapes
    /// returns: `shape`, on the CPU, contiguous, with memory of its own; nothing else of that size is made on the way.
    ///
    /// # Errors
    /// [`Error::TensorOutOfFile`] where an element lies outside the file, a stride is negative, or sizes do not fit.
    pub fn strided_tensor(&self, offset: usize, kind: Kind, shape: &[i64], strides: &[i64]) -> Result<Tensor, Error> {
        let width = kind.elt_size_in_bytes();
        let span = byte_span(width, shape, strides);
        let out_of_file = || self.out_of_file(offset, span.unwrap_or(usize::MAX), kind, shape);
        let end = span.and_then(|span| offset.checked_add(span)).ok_or_else(out_of_file)?;
        let bytes = self.map.get(offset..end).ok_or_else(out_of_file)?;
        byte_len(kind, shape).ok_or_else(out_of_file)?;
        // Non-negative, as the span was computed.
        let steps: Vec<usize> = strides.iter().map(|&stride| stride as usize * width).collect();
        let tensor = filled(kind, shape, |values| {
            gather(values, bytes, width, shape, &steps);
            Ok(())
        })?;
        self.release(offset, bytes.len());
        Ok(tensor)
    }

    fn out_of_file(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Error {
        Error::TensorOutOfFile { offset, len, file_len: self.map.len(), kind, shape: shape.to_vec() }
    }

    /// Takes the pages out of the process again; the page cache keeps them. A system that does not want to is no error.
    fn release(&self, offset: usize, len: usize) {
        if len > 0 {
            // SAFETY: a read-only mapping of a file has no contents that could be lost; touched again, pages are read again.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) };
        }
    }

    fn check(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Result<(), Error> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.map.len());
        if inside && byte_len(kind, shape) == Some(len) {
            Ok(())
        } else {
            Err(self.out_of_file(offset, len, kind, shape))
        }
    }

    /// Reads bytes that are known to lie in the file.
    fn fill(&self, offset: usize, bytes: &mut [u8]) -> Result<(), Error> {
        let read = |part: &mut [u8], at: usize| {
            self.file.read_exact_at(part, at as u64).map_err(|source| Error::Read {
                offset: at,
                len: part.len(),
                source,
            })
        };
        if bytes.len() < LARGE {
            return read(bytes, offset);
        }
        prefer_huge_pages(bytes);
        let readers = thread::available_parallelism().map_or(1, |n| n.get().min(MAX_READERS));
        let share = bytes.len().div_ceil(readers).next_multiple_of(HUGE_PAGE);
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

/// A fresh contiguous tensor whose bytes `fill` writes.
fn filled(kind: Kind, shape: &[i64], fill: impl FnOnce(&mut [u8]) -> Result<(), Error>) -> Result<Tensor, Error> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(|error| Error::Torch {
        op: "allocate tensor",
        message: error.to_string().lines().next().unwrap_or_default().to_owned(),
    })?;
    let len = tensor.numel() * kind.elt_size_in_bytes();
    if len > 0 {
        // SAFETY: the tensor is contiguous, has exactly `len` bytes, and nobody else knows it yet.
        fill(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), len) })?;
    }
    Ok(tensor)
}

/// Copies elements in row-major order; `steps` are bytes between neighbours along each axis.
fn gather(mut values: &mut [u8], bytes: &[u8], width: usize, shape: &[i64], steps: &[usize]) {
    let (inner, inner_step) = match (shape.last(), steps.last()) {
        (Some(&size), Some(&step)) => (size as usize, step),
        _ => (1, width),
    };
    let outer = shape.len().saturating_sub(1);
    let mut index = vec![0i64; outer];
    let mut start = 0;
    while !values.is_empty() {
        let (row, rest) = std::mem::take(&mut values).split_at_mut(inner * width);
        if inner_step == width {
            row.copy_from_slice(&bytes[start..start + inner * width]);
        } else {
            for (i, value) in row.chunks_exact_mut(width).enumerate() {
                value.copy_from_slice(&bytes[start + i * inner_step..][..width]);
            }
        }
        values = rest;
        for axis in (0..outer).rev() {
            index[axis] += 1;
            start += steps[axis];
            if index[axis] < shape[axis] {
                break;
            }
            start -= steps[axis] * shape[axis] as usize;
            index[axis] = 0;
        }
    }
}

/// Bytes of a tensor; none where the shape is negative or the product does not fit.
fn byte_len(kind: Kind, shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(kind.elt_size_in_bytes(), |product, &dim| product.checked_mul(usize::try_from(dim).ok()?))
}

/// Bytes from the first to the last element; none where a size or stride is negative, their numbers differ, or it does not fit.
fn byte_span(width: usize, shape: &[i64], strides: &[i64]) -> Option<usize> {
    if shape.len() != strides.len() {
        return None;
    }
    let mut last = 0usize;
    for (&size, &stride) in shape.iter().zip(strides) {
        let (size, stride) = (usize::try_from(size).ok()?, usize::try_from(stride).ok()?);
        last = last.checked_add(size.saturating_sub(1).checked_mul(stride)?)?;
    }
    if shape.contains(&0) { Some(0) } else { last.checked_add(1)?.checked_mul(width) }
}
