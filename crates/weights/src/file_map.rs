//! Mapping a file of weights, whatever its format.

use std::fs;
use std::path::Path;

use blip2_torchx::mapped_file::MappedFile;

use crate::error::WeightsError;
use crate::json_file::{is_lfs_pointer, read_error};

/// Maps a file that was really fetched.
pub(crate) fn map_file(path: &Path) -> Result<MappedFile, WeightsError> {
    let attributes = fs::metadata(path).map_err(|source| read_error(path, source))?;
    if !attributes.is_file() {
        return Err(WeightsError::NotAFile { path: path.to_path_buf() });
    }
    let mapped = MappedFile::open(path)
        .map_err(|error| WeightsError::Map { path: path.to_path_buf(), message: error.to_string() })?;
    if is_lfs_pointer(&mapped) {
        return Err(WeightsError::LfsPointer { path: path.to_path_buf() });
    }
    Ok(mapped)
}
