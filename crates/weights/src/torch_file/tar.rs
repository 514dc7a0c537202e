//! The oldest format (before PyTorch 0.1.10): a tar archive with the members `storages`, `tensors` and `pickle`. The pickle knows its tensors
//! by number; their shapes and storages are listed in the other two.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;

use tch::Kind;

use super::contents::{Contents, check_pickle_size};
use super::legacy::counted;
use super::machine;
use super::problem::TorchFileProblem;
use super::value::{Global, Pickle, StorageClaim, TensorClaim, Value};

const BLOCK: usize = 512;
/// Axes of a tensor, and more than any has.
const MAX_AXES: i32 = 64;

/// Whether the bytes begin with a tar header that names one of the format's members.
pub(super) fn is_tar(file: &[u8]) -> bool {
    file.len() >= BLOCK
        && ["sys_info", "pickle", "storages", "tensors"].iter().any(|name| {
            let field = file[..100].strip_prefix(b"./").unwrap_or(&file[..100]);
            field.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
        })
}

/// Reads the archive's pickle, the places of its storages and its tensors.
pub(super) fn read(file: &[u8]) -> Result<Contents, TorchFileProblem> {
    let members = members(file)?;
    let member = |name: &str| {
        let missing = || TorchFileProblem::Archive { message: format!("it has no member {name}") };
        members.get(name).cloned().ok_or_else(missing)
    };
    let (storages, storage_kinds) = storages(file, member("storages")?)?;
    let numbered = tensors(&file[member("tensors")?], &storages, &storage_kinds)?;
    let pickle = &file[member("pickle")?];
    check_pickle_size(pickle)?;
    Ok(Contents { pickle: machine::read(pickle)?, storages, numbered })
}

fn members(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, TorchFileProblem> {
    let damaged = |error: std::io::Error| {
        let message = error.to_string().escape_debug().collect();
        TorchFileProblem::Archive { message }
    };
    let mut members = BTreeMap::new();
    for entry in tar::Archive::new(Cursor::new(file)).entries().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_string();
        let range = usize::try_from(entry.raw_file_position()).ok().zip(usize::try_from(entry.size()).ok());
        let range = range.and_then(|(start, size)| Some(start..start.checked_add(size)?));
        let range = range.filter(|range| range.end <= file.len());
        let range = range.ok_or_else(|| TorchFileProblem::Truncated { part: format!("member {name:?}") })?;
        if members.insert(name.clone(), range).is_some() {
            return Err(TorchFileProblem::Archive { message: format!("it has two members {name:?}") });
        }
    }
    Ok(members)
}

type Storages = BTreeMap<String, Range<usize>>;

/// A count, then each storage as a pickle `(key, location, type)` with its elements; then the list of views.
fn storages(file: &[u8], member: Range<usize>) -> Result<(Storages, BTreeMap<String, Kind>), TorchFileProblem> {
    let file = &file[..member.end];
    let mut at = member.start;
    let count = integer(&next(file, &mut at)?)?;
    let (mut storages, mut kinds) = (Storages::new(), BTreeMap::new());
    for _ in 0..count {
        let described = next(file, &mut at)?;
        let [Value::Int(key), _, Value::Global(Global::Storage(Some(kind)))] = fields(&described).as_slice()[..] else {
            return Err(damaged("a storage without key and type"));
        };
        let key = key.to_string();
        let range = counted(file, at, kind.elt_size_in_bytes(), &key)?;
        at = range.end;
        kinds.insert(key.clone(), *kind);
        storages.insert(key, range);
    }
    let views = next(file, &mut at)?;
    if !matches!(views.get(views.root), Value::List(list) if list.is_empty()) {
        return Err(damaged("views of storages, which no file of weights has; save it again with a present PyTorch"));
    }
    Ok((storages, kinds))
}

/// A count, then each tensor as a pickle `(key, storage, type)` with axes, shape, strides and offset as plain integers.
fn tensors(
    member: &[u8],
    storages: &Storages,
    kinds: &BTreeMap<String, Kind>,
) -> Result<BTreeMap<i64, TensorClaim>, TorchFileProblem> {
    let mut at = 0;
    let count = integer(&next(member, &mut at)?)?;
    let mut tensors = BTreeMap::new();
    for _ in 0..count {
        let described = next(member, &mut at)?;
        let [Value::Int(number), Value::Int(storage), _] = fields(&described).as_slice()[..] else {
            return Err(damaged("a tensor without number and storage"));
        };
        let key = storage.to_string();
        let (Some(range), Some(&kind)) = (storages.get(&key), kinds.get(&key)) else {
            return Err(damaged("a tensor of a storage that is not there"));
        };
        let axes = i32::from_le_bytes(*chunk(member, &mut at)?);
        if !(0..=MAX_AXES).contains(&axes) {
            return Err(damaged("a tensor with more than 64 axes"));
        }
        // Four bytes that an early version wrote.
        let _: &[u8; 4] = chunk(member, &mut at)?;
        let mut integers = |count: i32| -> Result<Vec<i64>, TorchFileProblem> {
            (0..count).map(|_| chunk(member, &mut at).map(|bytes| i64::from_le_bytes(*bytes))).collect()
        };
        let (shape, strides, offset) = (integers(axes)?, integers(axes)?, integers(1)?[0]);
        let elements = (range.len() / kind.elt_size_in_bytes()) as i64;
        let storage = StorageClaim { key, kind: Some(kind), elements, view: None };
        tensors.insert(*number, TensorClaim { storage, kind, offset, shape, strides });
    }
    Ok(tensors)
}

fn next(bytes: &[u8], at: &mut usize) -> Result<Pickle, TorchFileProblem> {
    let pickle = machine::read(&bytes[*at..])?;
    *at += pickle.length;
    Ok(pickle)
}

fn integer(pickle: &Pickle) -> Result<i64, TorchFileProblem> {
    match pickle.get(pickle.root) {
        Value::Int(number) => Ok(*number),
        _ => Err(damaged("a count that is no number")),
    }
}

fn fields(pickle: &Pickle) -> Vec<&Value> {
    let Value::Tuple(items) = pickle.get(pickle.root) else { return Vec::new() };
    items.iter().take(4).map(|&id| pickle.get(id)).collect()
}

fn chunk<'a, const N: usize>(bytes: &'a [u8], at: &mut usize) -> Result<&'a [u8; N], TorchFileProblem> {
    let chunk = bytes[*at..].first_chunk::<N>();
    let chunk = chunk.ok_or_else(|| TorchFileProblem::Truncated { part: "its list of tensors".into() })?;
    *at += N;
    Ok(chunk)
}

fn damaged(message: &str) -> TorchFileProblem {
    TorchFileProblem::Archive { message: message.into() }
}
