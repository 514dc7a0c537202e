//! Writing a PyTorch file: a stored zip archive that `torch.load(weights_only=True)` reads, one tensor in memory at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use blip2_torchx::params::{TensorInfo, TensorSource};
use tch::Kind;

use crate::error::WeightsError;
use crate::save::{CopyError, stored_bytes, write_tensor};
use crate::staging::write_file;

/// Storages begin at multiples of this, as in PyTorch's own files.
const ALIGNMENT: u64 = 64;
/// The extra field that fills the gap in front of an entry's data, as PyTorch's writer calls it.
const PADDING_FIELD: u16 = 0x4246;
const LOCAL_BYTES: u64 = 30;
/// 1 January 1980, zip's first day: the bytes depend on the tensors alone.
const DATE: u16 = 0x0021;
const VERSION_NEEDED: u16 = 20;
const CRC_FIELD: u64 = 14;

/// One name of the written dictionary.
pub(crate) struct Entry<'a> {
    /// In the file.
    pub name: String,
    /// In the source. Names with the same one share a storage, as tied tensors do in PyTorch.
    pub source_name: &'a str,
}

/// Writes `{"model": {name: tensor}}` to `path`, beside it first, then renamed.
///
/// # Errors
/// A name that the source lacks, a dtype that PyTorch's storages have no name for, more than 4 GiB, or the system's refusal to write.
pub(crate) fn write_torch_file(source: &dyn TensorSource, entries: &[Entry], path: &Path) -> Result<(), WeightsError> {
    let infos: BTreeMap<String, TensorInfo> = source.entries().into_iter().collect();
    let mut storages: Vec<(&str, &TensorInfo)> = Vec::new();
    let mut tensors = Vec::new();
    for entry in entries {
        let info = infos.get(entry.source_name).ok_or_else(|| failed(&entry.name, "not in the source".into()))?;
        let key = storages.iter().position(|(name, _)| *name == entry.source_name).unwrap_or_else(|| {
            storages.push((entry.source_name, info));
            storages.len() - 1
        });
        tensors.push((entry.name.as_str(), key, info));
    }
    let pickle = pickle(&tensors)?;
    let refused = |source: io::Error| WeightsError::Write { path: path.to_path_buf(), source };
    write_file(path, |file| {
        let mut archive = Archive { file, at: 0, directory: Vec::new(), entries: 0 };
        archive.whole("model/data.pkl", &pickle).map_err(refused)?;
        archive.whole("model/byteorder", b"little").map_err(refused)?;
        let mut buffer = Vec::new();
        for (key, (name, info)) in storages.iter().enumerate() {
            let tensor = source.read(name).map_err(|message| failed(name, message))?;
            if tensor.kind() != info.kind || tensor.size() != info.shape {
                let got = format!("expected {info:?}, got {:?} {:?}", tensor.kind(), tensor.size());
                return Err(failed(name, got));
            }
            let mut entry = archive.begin(&format!("model/data/{key}"), stored_bytes(info)).map_err(refused)?;
            write_tensor(&tensor, &mut buffer, &mut entry).map_err(|error| match error {
                CopyError::Torch(error) => failed(name, error.to_string()),
                CopyError::Io(error) => refused(error),
            })?;
            entry.finish().map_err(refused)?;
        }
        archive.whole("model/version", b"3\n").map_err(refused)?;
        archive.finish().map_err(refused)
    })
}

fn failed(name: &str, message: String) -> WeightsError {
    WeightsError::Tensor { name: name.to_string(), message }
}

/// The object's pickle, protocol 2.
fn pickle(tensors: &[(&str, usize, &TensorInfo)]) -> Result<Vec<u8>, WeightsError> {
    let mut out = vec![0x80, 2, b'}'];
    text(&mut out, "model");
    out.extend(b"}(");
    for (name, key, info) in tensors {
        let storage =
            storage_class(info.kind).ok_or_else(|| failed(name, format!("PyTorch's files have no {:?}", info.kind)))?;
        let elements: i64 = info.shape.iter().product();
        text(&mut out, name);
        // _rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        integer(&mut out, elements);
        out.extend(b"tQK\x00");
        integers(&mut out, &info.shape);
        integers(&mut out, &row_major(&info.shape));
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"us.");
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: i64) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend(value.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend(value.to_le_bytes());
        }
    }
}

fn integers(out: &mut Vec<u8>, values: &[i64]) {
    out.push(b'(');
    values.iter().for_each(|&value| integer(out, value));
    out.push(b't');
}

fn row_major(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    strides
}

fn storage_class(kind: Kind) -> Option<&'static str> {
    Some(match kind {
        Kind::Float => "FloatStorage",
        Kind::Double => "DoubleStorage",
        Kind::Half => "HalfStorage",
        Kind::BFloat16 => "BFloat16Storage",
        Kind::Int64 => "LongStorage",
        Kind::Int => "IntStorage",
        Kind::Bool => "BoolStorage",
        Kind::Uint8 => "ByteStorage",
        _ => return None,
    })
}

struct Archive<'a> {
    file: &'a mut File,
    at: u64,
    directory: Vec<u8>,
    entries: u16,
}

/// An entry whose bytes are being written; its checksum is known at the end.
struct Open<'a, 'f> {
    archive: &'a mut Archive<'f>,
    name: String,
    header: u64,
    size: u32,
    sum: crc32fast::Hasher,
}

impl<'f> Archive<'f> {
    fn whole(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut entry = self.begin(name, bytes.len() as u64)?;
        entry.write_all(bytes)?;
        entry.finish()
    }

    fn begin(&mut self, name: &str, size: u64) -> io::Result<Open<'_, 'f>> {
        let header = self.at;
        let unpadded = header + LOCAL_BYTES + name.len() as u64 + 4;
        let data = unpadded.next_multiple_of(ALIGNMENT);
        let too_large = || io::Error::other("more than 4 GiB in one file");
        let size = u32::try_from(size).ok().filter(|&size| data + u64::from(size) < u64::from(u32::MAX));
        let size = size.ok_or_else(too_large)?;
        let padding = (data - unpadded) as u16;
        let mut bytes = b"PK\x03\x04".to_vec();
        bytes.extend([VERSION_NEEDED, 0, 0, 0, DATE].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend([0, size, size].iter().flat_map(|field| field.to_le_bytes()));
        let extra = [name.len() as u16, padding + 4];
        bytes.extend(extra.iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(name.as_bytes());
        bytes.extend([PADDING_FIELD, padding].iter().flat_map(|field| field.to_le_bytes()));
        bytes.resize(bytes.len() + usize::from(padding), 0);
        self.file.write_all(&bytes)?;
        self.at = data;
        Ok(Open { archive: self, name: name.to_string(), header, size, sum: crc32fast::Hasher::new() })
    }

    fn finish(self) -> io::Result<()> {
        let size = self.directory.len() as u32;
        self.file.write_all(&self.directory)?;
        let mut end = b"PK\x05\x06".to_vec();
        end.extend([0, 0, self.entries, self.entries].iter().flat_map(|field: &u16| field.to_le_bytes()));
        end.extend([size, self.at as u32].iter().flat_map(|field| field.to_le_bytes()));
        end.extend(0u16.to_le_bytes());
        self.file.write_all(&end)
    }
}

impl Open<'_, '_> {
    fn finish(self) -> io::Result<()> {
        let sum = self.sum.finalize();
        let archive = self.archive;
        archive.file.seek(SeekFrom::Start(self.header + CRC_FIELD))?;
        archive.file.write_all(&sum.to_le_bytes())?;
        archive.file.seek(SeekFrom::Start(archive.at))?;
        let mut record = b"PK\x01\x02".to_vec();
        record.extend([VERSION_NEEDED, VERSION_NEEDED, 0, 0, 0, DATE].iter().flat_map(|field| field.to_le_bytes()));
        record.extend([sum, self.size, self.size].iter().flat_map(|field| field.to_le_bytes()));
        record.extend([self.name.len() as u16, 0, 0, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
        record.extend([0, self.header as u32].iter().flat_map(|field: &u32| field.to_le_bytes()));
        record.extend(self.name.as_bytes());
        archive.directory.extend(record);
        archive.entries = archive.entries.checked_add(1).ok_or_else(|| io::Error::other("more than 65535 tensors"))?;
        Ok(())
    }
}

impl Write for Open<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.archive.file.write(bytes)?;
        self.sum.update(&bytes[..written]);
        self.archive.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.archive.file.flush()
    }
}
