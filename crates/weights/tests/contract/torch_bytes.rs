//! Files of `torch.save` made by hand, so that each can be wrong in one way.

use std::fs;
use std::path::PathBuf;

use blip2_torchx::params::TensorSource;
use blip2_weights::{TorchFile, TorchFileProblem, WeightsError};
use tempfile::TempDir;

use crate::fixtures::line;

/// Bytes of a pickle, opcode by opcode.
#[derive(Clone, Default)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    pub fn raw(mut self, bytes: &[u8]) -> Pickle {
        self.0.extend(bytes);
        self
    }

    pub fn text(self, text: &str) -> Pickle {
        self.raw(b"X").raw(&(text.len() as u32).to_le_bytes()).raw(text.as_bytes())
    }

    pub fn int(self, value: i64) -> Pickle {
        self.raw(&[0x8a, 8]).raw(&value.to_le_bytes())
    }

    pub fn ints(self, values: &[i64]) -> Pickle {
        values.iter().fold(self.raw(b"("), |pickle, &value| pickle.int(value)).raw(b"t")
    }

    /// A float32 tensor of the storage `key`.
    pub fn tensor(self, key: &str, elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Pickle {
        self.raw(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            .text("storage")
            .raw(b"ctorch\nFloatStorage\n")
            .text(key)
            .text("cpu")
            .int(elements)
            .raw(b"tQ")
            .int(offset)
            .ints(shape)
            .ints(strides)
            .raw(b"\x89ccollections\nOrderedDict\n)RtR")
    }

    /// `{name: …}` around what `fill` pushes, and the end.
    pub fn dict(name: &str, fill: impl FnOnce(Pickle) -> Pickle) -> Vec<u8> {
        fill(Pickle(vec![0x80, 2]).raw(b"}").text(name)).raw(b"s.").0
    }
}

/// A zip archive of stored entries.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let offset = file.len() as u32;
        let sizes = [0, bytes.len() as u32, bytes.len() as u32].map(u32::to_le_bytes).concat();
        let header = [&[0; 10][..], &sizes, &(name.len() as u16).to_le_bytes(), &[0, 0]].concat();
        file.extend([b"PK\x03\x04", &header[..], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02\0\0", &header[..], &[0; 10], &offset.to_le_bytes(), name.as_bytes()].concat());
    }
    let (count, size, start) = (entries.len() as u16, directory.len() as u32, file.len() as u32);
    file.extend(directory);
    file.extend([&b"PK\x05\x06\0\0\0\0"[..], &count.to_le_bytes(), &count.to_le_bytes()].concat());
    file.extend([&size.to_le_bytes()[..], &start.to_le_bytes(), &[0, 0]].concat());
    file
}

/// An archive of this pickle and one storage `0` of four float32: 1, 2, 3, 4.
pub fn archive(pickle: &[u8]) -> Vec<u8> {
    let storage: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    zip(&[("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", &storage), ("a/version", b"3\n")])
}

pub fn written(bytes: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.pth");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

pub fn open(bytes: &[u8]) -> TorchFile {
    let (_directory, path) = written(bytes);
    TorchFile::open(&path).unwrap()
}

/// Why these bytes are refused, in one line that names the file.
pub fn problem(bytes: &[u8]) -> TorchFileProblem {
    let (_directory, path) = written(bytes);
    match TorchFile::open(&path) {
        Err(WeightsError::TorchFile { problem, .. }) => {
            let message = line(TorchFile::open(&path));
            assert!(message.starts_with(&path.display().to_string()), "{message}");
            problem
        }
        Err(other) => panic!("{other}"),
        Ok(file) => panic!("accepted, with {:?}", file.entries()),
    }
}

/// The problem of an archive with this pickle.
pub fn problem_of(pickle: &[u8]) -> TorchFileProblem {
    problem(&archive(pickle))
}
