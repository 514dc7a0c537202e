//! The format before the zip archive (PyTorch 0.1.10 to 1.5, and `_use_new_zipfile_serialization=False`): five pickles in a row (a magic
//! number, 1001, the writer's system, the object, the storages' keys), then each storage as its number of elements and its bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::contents::{Contents, check_pickle_size};
use super::machine;
use super::problem::TorchFileProblem;
use super::value::{Id, Pickle, Value};

/// 0x1950a86a20f9469cfc6c, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// Whether the bytes begin like a pickle.
pub(super) fn is_pickle(file: &[u8]) -> bool {
    file.first() == Some(&0x80)
}

/// Reads the stream's pickles and the places of its storages.
pub(super) fn read(file: &[u8]) -> Result<Contents, TorchFileProblem> {
    let mut at = 0;
    let mut next = || {
        let pickle = machine::read(&file[at..])?;
        at += pickle.length;
        Ok(pickle)
    };
    let magic: Pickle = next()?;
    if !matches!(magic.get(magic.root), Value::Long(number) if *number == MAGIC) {
        return Err(TorchFileProblem::Unknown);
    }
    let protocol = next()?;
    if !matches!(protocol.get(protocol.root), Value::Int(PROTOCOL)) {
        return Err(damaged("its protocol is not 1001"));
    }
    let system = next()?;
    let little = system.entry(system.root, "little_endian").map(|id| system.get(id));
    if !matches!(little, Some(Value::Bool(true))) {
        return Err(TorchFileProblem::ByteOrder { got: "not little-endian".into() });
    }
    let pickle = next()?;
    let keys = next()?;
    check_pickle_size(&file[..at])?;
    let storages = storages(file, at, &pickle, &keys)?;
    Ok(Contents { pickle, storages, numbered: BTreeMap::new() })
}

/// Where each storage lies, in the order of the keys.
fn storages(
    file: &[u8],
    mut at: usize,
    pickle: &Pickle,
    keys: &Pickle,
) -> Result<BTreeMap<String, Range<usize>>, TorchFileProblem> {
    let mut widths = BTreeMap::new();
    for value in &pickle.values {
        if let Value::Storage(claim) = value {
            let width = claim.kind.map_or(1, |kind| kind.elt_size_in_bytes());
            widths.entry(claim.key.as_str()).or_insert(width);
        }
    }
    let (Value::List(ids) | Value::Tuple(ids)) = keys.get(keys.root) else {
        return Err(damaged("the storages' keys are no list"));
    };
    let mut storages = BTreeMap::new();
    for &id in ids {
        let key = key_of(keys, id).ok_or_else(|| damaged("a storage's key is no text"))?;
        let width = *widths.get(key.as_str()).ok_or_else(|| damaged("a storage that no tensor refers to"))?;
        let range = counted(file, at, width, &key)?;
        at = range.end;
        if storages.insert(key, range).is_some() {
            return Err(damaged("a storage that comes twice"));
        }
    }
    Ok(storages)
}

fn key_of(pickle: &Pickle, id: Id) -> Option<String> {
    match pickle.get(id) {
        Value::Text(key) => Some(key.clone()),
        Value::Int(key) => Some(key.to_string()),
        _ => None,
    }
}

/// The bytes of a storage that begins with its number of elements of `width` bytes.
pub(super) fn counted(file: &[u8], at: usize, width: usize, key: &str) -> Result<Range<usize>, TorchFileProblem> {
    let truncated = || TorchFileProblem::Truncated { part: format!("storage {key:?}") };
    let count = file.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(truncated)?;
    let count = usize::try_from(i64::from_le_bytes(*count))
        .map_err(|_| TorchFileProblem::Storage { key: key.into(), message: "a negative number of elements".into() })?;
    let start = at + 8;
    let end = count.checked_mul(width).and_then(|bytes| start.checked_add(bytes));
    let end = end.filter(|end| *end <= file.len()).ok_or_else(truncated)?;
    Ok(start..end)
}

fn damaged(message: &str) -> TorchFileProblem {
    TorchFileProblem::Archive { message: message.into() }
}
