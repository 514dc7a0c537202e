//! JSON files of a model directory.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use crate::error::WeightsError;
use crate::header::repeated_key;

const LFS_PREFIX: &[u8] = b"version https://git-lfs";

/// Whether these are the bytes of a Git LFS pointer file.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(LFS_PREFIX)
}

/// A directory's or file's error by what the system said.
pub(crate) fn read_error(path: &Path, source: io::Error) -> WeightsError {
    match source.kind() {
        io::ErrorKind::NotFound => WeightsError::NotFound { path: path.to_path_buf() },
        _ => WeightsError::Read { path: path.to_path_buf(), source },
    }
}

/// Reads a JSON object; a key that appears twice at its top is an error.
pub(crate) fn read_object(path: &Path) -> Result<Value, WeightsError> {
    let bytes = fs::read(path).map_err(|source| read_error(path, source))?;
    if is_lfs_pointer(&bytes) {
        return Err(WeightsError::LfsPointer { path: path.to_path_buf() });
    }
    let invalid = |message: String| WeightsError::Json { path: path.to_path_buf(), message };
    let text = std::str::from_utf8(&bytes).map_err(|e| invalid(e.to_string()))?;
    let value: Value = serde_json::from_str(text).map_err(|e| invalid(e.to_string()))?;
    if !value.is_object() {
        return Err(invalid("expected an object".into()));
    }
    match repeated_key(text) {
        Some(key) => Err(invalid(format!("key {key:?} appears twice"))),
        None => Ok(value),
    }
}

/// A JSON value in a few characters, for messages.
pub(crate) fn describe(value: Option<&Value>) -> String {
    match value {
        None => "nothing".into(),
        Some(Value::Array(_)) => "an array".into(),
        Some(Value::Object(_)) => "an object".into(),
        Some(other) => other.to_string(),
    }
}
