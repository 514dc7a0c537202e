//! `MANIFEST.json`: what a checkpoint consists of; written last, so that its presence says that the rest is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::CheckpointError;

pub(super) const MANIFEST: &str = "MANIFEST.json";
const FORMAT: u32 = 1;

/// A held-out metric measured at a checkpoint's step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Its name, as in `checkpoint.best`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

/// Length and digest of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileEntry {
    pub(super) bytes: u64,
    pub(super) blake3: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u32,
    pub(super) step: u64,
    pub(super) metric: Option<Metric>,
    pub(super) files: BTreeMap<String, FileEntry>,
}

impl Manifest {
    pub(super) fn new(step: u64, metric: Option<Metric>, files: BTreeMap<String, FileEntry>) -> Self {
        Self { format: FORMAT, step, metric, files }
    }

    /// Reads the manifest of a checkpoint's folder, not yet its files.
    pub(super) fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CheckpointError::NoManifest { path: folder.to_path_buf() });
            }
            Err(error) => return Err(CheckpointError::io(path)(error)),
        };
        let bad = |reason: String| CheckpointError::BadManifest { path: path.clone(), reason };
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(bad(format!("format {}; this program reads {FORMAT}", manifest.format)));
        }
        // A name is a file in this folder, never a path out of it.
        if let Some(name) = manifest.files.keys().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(bad(format!("the file name {name:?}")));
        }
        Ok(manifest)
    }

    /// Compares length and digest of every file with the manifest.
    pub(super) fn verify(&self, folder: &Path) -> Result<(), CheckpointError> {
        for (name, entry) in &self.files {
            let path = folder.join(name);
            let damaged =
                |expected: String, got: String| Err(CheckpointError::Damaged { path: path.clone(), expected, got });
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return damaged(format!("{} bytes", entry.bytes), "no file".into());
                }
                Err(error) => return Err(CheckpointError::io(path)(error)),
            };
            let bytes = file.metadata().map_err(CheckpointError::io(&path))?.len();
            if bytes != entry.bytes {
                return damaged(format!("{} bytes", entry.bytes), bytes.to_string());
            }
            let digest = digest(file).map_err(CheckpointError::io(&path))?;
            if digest != entry.blake3 {
                return damaged(format!("blake3 {}", entry.blake3), digest);
            }
        }
        Ok(())
    }
}

fn digest(file: File) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// A checkpoint whose every file was compared with its manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Opens a checkpoint's folder and verifies it.
    ///
    /// # Errors
    /// It has no manifest, or a file is missing or not what the manifest says.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let manifest = Manifest::read(path)?;
        manifest.verify(path)?;
        Ok(Self { path: path.to_path_buf(), manifest })
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The metric measured at this step, where one was.
    pub fn metric(&self) -> Option<&Metric> {
        self.manifest.metric.as_ref()
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}
