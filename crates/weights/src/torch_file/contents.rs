//! What the formats have in common: a pickle, the places of the storages, and tensors checked against them.

use std::collections::BTreeMap;
use std::ops::Range;

use blip2_torchx::params::TensorInfo;
use tch::Kind;

use super::problem::TorchFileProblem;
use super::value::{Pickle, StorageClaim, TensorClaim};

/// Pickles hold names and shapes only; those of the largest models have some megabytes.
const MAX_PICKLE_BYTES: u64 = 256 << 20;

/// A file's pickle with what it refers to.
pub(super) struct Contents {
    pub pickle: Pickle,
    /// Bytes of each storage, as ranges of the file.
    pub storages: BTreeMap<String, Range<usize>>,
    /// The tensors of a tar file, which its pickle knows by number.
    pub numbered: BTreeMap<i64, TensorClaim>,
}

/// A tensor that lies inside the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StoredTensor {
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// In elements.
    pub strides: Vec<i64>,
    /// Of its first element, from the beginning of the file.
    pub offset: usize,
    /// Whether its elements are in row-major order without gaps.
    pub contiguous: bool,
}

impl StoredTensor {
    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }

    pub fn info(&self) -> TensorInfo {
        TensorInfo { kind: self.kind, shape: self.shape.clone() }
    }
}

/// Refuses a pickle larger than any model's.
pub(super) fn check_pickle_size(pickle: &[u8]) -> Result<(), TorchFileProblem> {
    let limit = MAX_PICKLE_BYTES;
    if pickle.len() as u64 > limit {
        return Err(TorchFileProblem::Limit { what: "pickle's bytes", limit });
    }
    Ok(())
}

impl Contents {
    /// Checks that a tensor lies inside its storage and the storage inside the file.
    pub fn place(&self, name: &str, claim: &TensorClaim) -> Result<StoredTensor, TorchFileProblem> {
        let storage = self.storage(&claim.storage)?;
        let width = claim.kind.elt_size_in_bytes();
        let held = (storage.len() / width) as i64;
        let wrong = |message: String| TorchFileProblem::Tensor { name: name.into(), message };
        let TensorClaim { shape, strides, offset, kind, .. } = claim;
        if shape.len() != strides.len() {
            return Err(wrong(format!("shape {shape:?} and strides {strides:?} have different lengths")));
        }
        if shape.iter().chain(strides).chain([offset]).any(|&n| n < 0) {
            return Err(wrong(format!(
                "a negative number in shape {shape:?}, strides {strides:?} or storage offset {offset}"
            )));
        }
        // An empty tensor's other axes may be of any size, but must have strides that fit.
        let elements = shape.iter().filter(|&&n| n > 0).try_fold(1i64, |product, &n| product.checked_mul(n));
        let span = shape
            .iter()
            .zip(strides)
            .try_fold(1i64, |last, (&n, &stride)| last.checked_add((n - 1).max(0).checked_mul(stride)?));
        let empty = shape.contains(&0);
        let (Some(elements), Some(span)) = (elements, span) else {
            return Err(wrong(format!("shape {shape:?} with strides {strides:?} exceeds 2^63 elements")));
        };
        let end = offset.checked_add(if empty { 0 } else { span }).filter(|end| *end <= held);
        if end.is_none() {
            return Err(wrong(format!(
                "shape {shape:?}, strides {strides:?}, storage offset {offset} reach beyond storage {:?} of {held} elements of {kind:?}",
                claim.storage.key
            )));
        }
        // A few bytes cannot be many elements: an expanded tensor would take memory without end.
        if !empty && elements > span {
            return Err(wrong(format!("elements of shape {shape:?} with strides {strides:?} overlap")));
        }
        Ok(StoredTensor {
            kind: *kind,
            shape: shape.clone(),
            strides: strides.clone(),
            offset: storage.start + *offset as usize * width,
            contiguous: is_contiguous(shape, strides),
        })
    }

    fn storage(&self, claim: &StorageClaim) -> Result<Range<usize>, TorchFileProblem> {
        let key = &claim.key;
        let wrong = |message: String| TorchFileProblem::Storage { key: key.clone(), message };
        let range = self.storages.get(key).ok_or_else(|| wrong("the file has no such storage".into()))?;
        let width = claim.kind.map_or(1, |kind| kind.elt_size_in_bytes()) as i64;
        let claimed = claim.elements.checked_mul(width).and_then(|bytes| usize::try_from(bytes).ok());
        if claimed != Some(range.len()) {
            let (elements, held) = (claim.elements, range.len());
            return Err(wrong(format!(
                "claimed to have {elements} elements of {width} bytes, but {held} bytes are there"
            )));
        }
        let Some((offset, size)) = claim.view else { return Ok(range.clone()) };
        let inside = offset >= 0 && size >= 0 && offset.checked_add(size).is_some_and(|end| end <= claim.elements);
        if !inside {
            return Err(wrong(format!(
                "a view of {size} elements from {offset} reaches beyond its {}",
                claim.elements
            )));
        }
        let start = range.start + (offset * width) as usize;
        Ok(start..start + (size * width) as usize)
    }
}

/// As libtorch sees it: strides of axes of size 1 do not matter, an empty tensor always is.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size == 0 {
            return true;
        }
        if size != 1 {
            if stride != expected {
                return shape.contains(&0);
            }
            expected *= size;
        }
    }
    true
}
