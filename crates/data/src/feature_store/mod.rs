//! The frozen image encoder's output on disk, so that each view of an image is encoded once for all epochs, stages and runs.
//!
//! ```text
//! DIR/KEY/cache.json                        what the features of this folder are; KEY is its digest     description
//! DIR/KEY/SHARD.DIGEST.vVIEW.feat           one view of one shard: a record and a payload a sample      shard_file
//! ```
//!
//! A shard is known by the digest of its index and its length, an image by the digest of its bytes, so that every set that holds the shard
//! shares its rows. Nothing is synced: a row whose record and payload do not agree counts as absent and is computed again.

mod audit;
mod description;
mod fill;
mod run_features;
mod shard_file;
mod view;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

pub use audit::{BadRow, CacheStats, CacheVerification, stats, verify};
pub use description::{Description, EncoderIdentity, FeatureFormat, ImageSteps};
pub use fill::{FillOptions, FillReader, LackingRow, ViewBatch};
pub use run_features::{FeatureRow, RunFeatures, RunFeaturesOptions, Writer};
pub use shard_file::StoredRow;

use crate::{DataError, Shard, atomic};
use shard_file::{Access, ShardFile, ShardHeader};
pub(crate) use view::view_frame;

/// Says what the features of a folder are.
const DESCRIPTION_FILE: &str = "cache.json";
/// No description of ours is as long.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 16;
/// Files that are kept open.
const KEEP_OPEN: usize = 128;

/// Where a row lies: a view of a sample of a shard.
#[derive(Clone, Copy)]
pub struct RowPlace<'a> {
    /// The shard.
    pub shard: &'a Shard,
    /// Number of the sample in it.
    pub ordinal: u64,
    /// Number of the view.
    pub view: u64,
}

/// The features of one encoder behind one image transform. Any thread and any process may read and write.
pub struct FeatureStore {
    folder: PathBuf,
    key: String,
    row_bytes: usize,
    open: Mutex<VecDeque<(PathBuf, Arc<ShardFile>)>>,
}

impl FeatureStore {
    /// The store below `dir` that holds features as `description` says; made where it is missing.
    ///
    /// # Errors
    /// When the folder cannot be made or read, or holds something else.
    pub fn open(dir: &Path, description: &Description) -> Result<FeatureStore, DataError> {
        let key = description.key();
        let folder = dir.join(&key);
        let path = folder.join(DESCRIPTION_FILE);
        let text = description.to_file();
        if !path.exists() {
            atomic::write(&path, |out| std::io::Write::write_all(out, text.as_bytes()))
                .map_err(DataError::io(&path))?;
        }
        if read_description(&path)? != text.as_bytes() {
            let reason =
                "it does not describe the features that its folder is named after; delete the folder".to_owned();
            return Err(DataError::FeatureCache { path, reason });
        }
        Ok(FeatureStore { folder, key, row_bytes: description.row_bytes(), open: Mutex::default() })
    }

    /// The folder of its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Length of a row's payload.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The row at `place`, where it is whole and was made from the image with this digest.
    pub fn read(&self, place: RowPlace, image: u64) -> Option<StoredRow> {
        self.file(place, Access::Existing).ok()??.read(place.ordinal, image)
    }

    /// Whether a row of this image has been written at `place`; whether it is whole, only reading tells.
    pub fn holds(&self, place: RowPlace, image: u64) -> bool {
        matches!(self.file(place, Access::Existing), Ok(Some(file)) if file.holds(place.ordinal, image))
    }

    /// Writes a row, over the one that is there.
    ///
    /// # Errors
    /// When the disk refuses; the row then counts as absent.
    pub fn write(&self, place: RowPlace, row: &StoredRow) -> Result<(), DataError> {
        let file = self.file(place, Access::Create)?;
        let file =
            file.ok_or_else(|| DataError::Io { path: self.path(place), source: std::io::ErrorKind::NotFound.into() })?;
        file.write(place.ordinal, row).map_err(DataError::io(self.path(place)))
    }

    fn path(&self, place: RowPlace) -> PathBuf {
        self.folder.join(ShardHeader::file_name(place.shard, place.view))
    }

    /// The open file of a shard's view, from memory where it was used lately.
    fn file(&self, place: RowPlace, access: Access) -> Result<Option<Arc<ShardFile>>, DataError> {
        let path = self.path(place);
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = open.iter().position(|(name, _)| *name == path)
                && let Some(entry) = open.remove(at)
            {
                let file = Arc::clone(&entry.1);
                open.push_back(entry);
                return Ok(Some(file));
            }
        }
        let header = ShardHeader::new(&self.key, place.shard, place.view, self.row_bytes);
        let Some(file) = ShardFile::open(&path, &header, access).map_err(DataError::io(&path))? else {
            return Ok(None);
        };
        let file = Arc::new(file);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Two threads may have opened it; both handles lead to the same file.
        open.push_back((path, Arc::clone(&file)));
        if open.len() > KEEP_OPEN {
            open.pop_front();
        }
        Ok(Some(file))
    }
}

/// What a description's file holds, as far as a description reaches.
fn read_description(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_DESCRIPTION_BYTES).read_to_end(&mut bytes));
    read.map_err(DataError::io(path)).map(|_| bytes)
}

impl fmt::Debug for FeatureStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FeatureStore").field("folder", &self.folder).finish_non_exhaustive()
    }
}
