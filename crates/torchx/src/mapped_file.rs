//! Files mapped into memory: weights are read from the page cache straight into tensors.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};
use tch::{Device, Kind, Tensor};

use crate::error::Error;

/// How much of a file is in the process at a time while a tensor is copied out of it.
const CHUNK_BYTES: usize = 16 << 20;

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

    /// Copies a little-endian, row-major tensor out of the file; the file's pages then no longer count as this process's memory.
    ///
    /// # Shapes
    /// returns: `shape`, on the CPU, with memory of its own.
    ///
    /// # Errors
    /// [`Error::TensorOutOfFile`] where the bytes lie outside the file or are not as many as the shape needs.
    pub fn tensor(&self, offset: usize, len: usize, kind: Kind, shape: &[i64]) -> Result<Tensor, Error> {
        let out_of_file = || self.out_of_file(offset, len, kind, shape);
        let bytes = offset.checked_add(len).and_then(|end| self.map.get(offset..end)).ok_or_else(out_of_file)?;
        if byte_len(kind, shape) != Some(len) {
            return Err(out_of_file());
        }
        filled(kind, shape, |values| {
            for (i, (values, bytes)) in values.chunks_mut(CHUNK_BYTES).zip(bytes.chunks(CHUNK_BYTES)).enumerate() {
                values.copy_from_slice(bytes);
                self.release(offset + i * CHUNK_BYTES, bytes.len());
            }
        })
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
        let tensor = filled(kind, shape, |values| gather(values, bytes, width, shape, &steps))?;
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
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// A fresh contiguous tensor whose bytes `fill` writes.
fn filled(kind: Kind, shape: &[i64], fill: impl FnOnce(&mut [u8])) -> Result<Tensor, Error> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(|error| Error::Torch {
        op: "allocate tensor",
        message: error.to_string().lines().next().unwrap_or_default().to_owned(),
    })?;
    let len = tensor.numel() * kind.elt_size_in_bytes();
    if len > 0 {
        // SAFETY: the tensor is contiguous, has exactly `len` bytes, and nobody else knows it yet.
        fill(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), len) });
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
