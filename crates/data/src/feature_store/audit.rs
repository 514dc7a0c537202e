//! What a folder of stores holds, and whether every row of it is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::shard_file::{EXTENSION, RECORD_BYTES, ShardFile, UNFINISHED};
use super::{DESCRIPTION_FILE, Description, read_description};
use crate::DataError;

/// What one key's folder holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheStats {
    /// Name of the folder.
    pub key: String,
    /// What its features are.
    pub description: Description,
    /// Shards with at least one file.
    pub shards: usize,
    /// Pictures with at least one row.
    pub pictures: u64,
    /// Views with at least one file.
    pub views: usize,
    /// Rows written.
    pub rows: u64,
    /// Bytes of these rows with their records.
    pub bytes: u64,
    /// Bytes that the files take on the disk.
    pub disk_bytes: u64,
    /// Bytes on the disk by picture; 0 without any.
    pub bytes_per_picture: f64,
    /// Files without a header of this key.
    pub damaged_files: Vec<PathBuf>,
}

/// A row or a file that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadRow {
    /// The file.
    pub file: PathBuf,
    /// Number of the sample in its shard; `None` where the whole file is meant.
    pub row: Option<u64>,
    /// What is wrong.
    pub reason: String,
}

/// What reading every row found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CacheVerification {
    /// Keys looked at.
    pub keys: usize,
    /// Files read.
    pub files: usize,
    /// Rows that are whole.
    pub good: u64,
    /// The others.
    pub bad: Vec<BadRow>,
    /// Whether they were cleared.
    pub repaired: bool,
}

/// A key's folder.
struct Folder {
    key: String,
    description: Description,
    files: Vec<PathBuf>,
    unfinished: Vec<PathBuf>,
}

/// What the stores below `dir` hold, by key.
///
/// # Errors
/// When there is no store, or a file cannot be read.
pub fn stats(dir: &Path) -> Result<Vec<CacheStats>, DataError> {
    folders(dir)?.into_iter().map(key_stats).collect()
}

fn key_stats(folder: Folder) -> Result<CacheStats, DataError> {
    let Folder { key, description, files, .. } = folder;
    let row_bytes = description.row_bytes() as u64 + RECORD_BYTES;
    let mut pictures: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    let (mut views, mut rows, mut disk_bytes, mut damaged_files) = (BTreeSet::new(), 0, 0, Vec::new());
    for path in files {
        let Some(file) = open(&path, &key, &description)? else {
            damaged_files.push(path);
            continue;
        };
        views.insert(file.header.view);
        disk_bytes += file.disk_bytes().map_err(DataError::io(&path))?;
        let seen = pictures.entry(file.header.digest.clone()).or_default();
        for (at, record) in file.records().map_err(DataError::io(&path))?.enumerate() {
            if seen.len() <= at {
                seen.push(false);
            }
            if !record.is_absent() {
                rows += 1;
                seen[at] = true;
            }
        }
    }
    let shards = pictures.len();
    let pictures = pictures.values().flatten().filter(|&&seen| seen).count() as u64;
    Ok(CacheStats {
        key,
        description,
        shards,
        pictures,
        views: views.len(),
        rows,
        bytes: rows * row_bytes,
        disk_bytes,
        bytes_per_picture: if pictures == 0 { 0.0 } else { disk_bytes as f64 / pictures as f64 },
        damaged_files,
    })
}

/// Reads every row of the stores below `dir`; with `repair`, what is damaged is cleared, to be computed again by the next run that needs it.
/// `progress` is called with the number of files done and of all.
///
/// # Errors
/// When there is no store, a file cannot be read, or a damaged one cannot be cleared.
pub fn verify(dir: &Path, repair: bool, progress: impl Fn(u64, u64) + Sync) -> Result<CacheVerification, DataError> {
    let folders = folders(dir)?;
    let all = folders.iter().map(|folder| folder.files.len() as u64).sum();
    let done = AtomicU64::new(0);
    let mut found =
        CacheVerification { keys: folders.len(), files: all as usize, good: 0, bad: Vec::new(), repaired: repair };
    for Folder { key, description, files, unfinished } in folders {
        let results: Vec<(u64, Vec<BadRow>)> = files
            .par_iter()
            .map(|path| {
                let result = verify_file(path, &key, &description, repair);
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, all);
                result
            })
            .collect::<Result<_, DataError>>()?;
        for (good, bad) in results {
            found.good += good;
            found.bad.extend(bad);
        }
        if repair {
            unfinished.iter().try_for_each(|path| fs::remove_file(path).map_err(DataError::io(path)))?;
        }
    }
    Ok(found)
}

fn verify_file(
    path: &Path,
    key: &str,
    description: &Description,
    repair: bool,
) -> Result<(u64, Vec<BadRow>), DataError> {
    let bad = |row, reason: &str| BadRow { file: path.to_owned(), row, reason: reason.to_owned() };
    let Some(file) = open(path, key, description)? else {
        if repair {
            fs::remove_file(path).map_err(DataError::io(path))?;
        }
        return Ok((0, vec![bad(None, "it has no header of this cache")]));
    };
    let (mut good, mut found) = (0, Vec::new());
    for (ordinal, record) in (0..).zip(file.records().map_err(DataError::io(path))?) {
        if record.is_absent() {
            continue;
        }
        if file.row(ordinal, record).is_some() {
            good += 1;
            continue;
        }
        if repair {
            file.clear(ordinal).map_err(DataError::io(path))?;
        }
        found.push(bad(Some(ordinal), "its checksum is not the one that was written"));
    }
    Ok((good, found))
}

/// The file, where it is one of this key's.
fn open(path: &Path, key: &str, description: &Description) -> Result<Option<ShardFile>, DataError> {
    let file = ShardFile::open_any(path).map_err(DataError::io(path))?;
    Ok(file.filter(|file| file.header.key == key && file.header.row_bytes == description.row_bytes() as u64))
}

/// The keys' folders below `dir`, by name.
fn folders(dir: &Path) -> Result<Vec<Folder>, DataError> {
    let list = |path: &Path| -> Result<Vec<PathBuf>, DataError> {
        let entries =
            fs::read_dir(path).and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
        let mut entries = entries.map_err(DataError::io(path))?;
        entries.sort();
        Ok(entries)
    };
    let mut folders = Vec::new();
    for folder in list(dir)? {
        let path = folder.join(DESCRIPTION_FILE);
        if !path.exists() {
            continue;
        }
        let key = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let found = Description::from_file(&read_description(&path)?);
        let description = found.filter(|description| description.key() == key);
        let Some(description) = description else {
            let reason =
                "it does not describe the features that its folder is named after; delete the folder".to_owned();
            return Err(DataError::FeatureCache { path, reason });
        };
        let entries = list(&folder)?;
        let named = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == EXTENSION);
        let left =
            |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED));
        folders.push(Folder {
            key,
            description,
            files: entries.iter().filter(named).cloned().collect(),
            unfinished: entries.iter().filter(left).cloned().collect(),
        });
    }
    if folders.is_empty() {
        let reason = "expected a feature cache, found no folder with a cache.json in it".to_owned();
        return Err(DataError::FeatureCache { path: dir.to_owned(), reason });
    }
    Ok(folders)
}
