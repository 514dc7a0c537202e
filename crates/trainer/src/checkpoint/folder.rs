//! A checkpoint while it is being written: files with their digests, then the manifest.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use blip2_data::{DigestWriter, write_file};

use super::error::CheckpointError;
use super::manifest::{FileEntry, MANIFEST, Manifest, Metric};

/// A folder that becomes a checkpoint when it is complete.
#[derive(Debug)]
pub struct CheckpointFolder {
    path: PathBuf,
    files: BTreeMap<String, FileEntry>,
}

impl CheckpointFolder {
    pub(super) fn create(path: PathBuf) -> Result<Self, CheckpointError> {
        fs::create_dir(&path).map_err(write_error(&path))?;
        Ok(Self { path, files: BTreeMap::new() })
    }

    /// Where a file of this name will lie for now; for messages.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes one file with `fill`, syncs it, and notes its length and digest.
    ///
    /// # Errors
    /// The file cannot be created, or `fill` fails.
    pub fn file<E>(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<(), CheckpointError>
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let path = self.path.join(name);
        let file = File::create_new(&path).map_err(write_error(&path))?;
        let mut out = DigestWriter::new(BufWriter::new(file));
        fill(&mut out).map_err(|error| CheckpointError::write(&path, error.into()))?;
        let (file, bytes, digest) = out.finish();
        let file = file.into_inner().map_err(|error| write_error(&path)(error.into_error()))?;
        file.sync_all().map_err(write_error(&path))?;
        self.files.insert(name.to_string(), FileEntry { bytes, blake3: digest.to_string() });
        Ok(())
    }

    /// Writes the manifest and syncs the folder.
    pub(super) fn seal(self, step: u64, metric: Option<Metric>) -> Result<(), CheckpointError> {
        let path = self.path.join(MANIFEST);
        let json = serde_json::to_vec_pretty(&Manifest::new(step, metric, self.files));
        let json = json.map_err(io::Error::from).map_err(write_error(&path))?;
        write_file(&path, &json).map_err(write_error(&path))
    }
}

pub(super) fn write_error(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + '_ {
    move |error| CheckpointError::write(path, Box::new(error))
}
