//! A row of any source: what it says, or what is wrong with it.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::pairs::PairFiles;
use crate::DataError;
use crate::shards::index::MAX_IMAGE_BYTES;

/// Why a row cannot be used.
pub(crate) enum Unusable {
    /// It is left out, for this reason.
    Row(String),
    /// This machine cannot read it now, whatever it is: that ends the packing, which can be gone on with.
    Machine(DataError),
}

impl From<String> for Unusable {
    fn from(reason: String) -> Unusable {
        Unusable::Row(reason)
    }
}

/// A row as its source gives it.
pub(crate) struct Row {
    /// Its key in the shards: unique, from 1, and for lines of a single file the line's number.
    pub(crate) number: u64,
    /// Where it stands, for messages.
    pub(crate) place: Place,
    /// What it holds.
    pub(crate) data: Result<RowData, String>,
}

/// Where a row stands.
#[derive(Clone)]
pub(crate) enum Place {
    /// `captions.jsonl:4`
    Line { file: Arc<str>, line: u64 },
    /// `train.parquet: row 4`
    Numbered { file: Arc<str>, what: &'static str, number: u64 },
    /// `00000/000000004`
    Named { name: String, number: u64 },
}

impl Place {
    /// Its number among its like, from 1.
    pub(crate) fn number(&self) -> u64 {
        match *self {
            Place::Line { line, .. } => line,
            Place::Numbered { number, .. } | Place::Named { number, .. } => number,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line { file, line } => write!(f, "{file}:{line}"),
            Place::Numbered { file, what, number } => write!(f, "{file}: {what} {number}"),
            Place::Named { name, .. } => f.write_str(name),
        }
    }
}

/// A row's contents, or the files that have them: those are read where many rows are read side by side.
pub(crate) enum RowData {
    Content(Content),
    Files(PairFiles),
}

/// A picture with what is said of it.
pub(crate) struct Content {
    pub(crate) image: ImageSource,
    /// At least one for a row that can be used; blank ones do not count.
    pub(crate) captions: Vec<String>,
    /// Further metadata for the sample's `.json`.
    pub(crate) fields: Map<String, Value>,
}

/// Where a row's image is.
pub(crate) enum ImageSource {
    /// In the first of these files that exists; there is at least one name.
    Files(Vec<PathBuf>),
    /// Here, under this name.
    #[cfg_attr(not(feature = "parquet"), expect(dead_code))]
    Bytes { name: String, bytes: Vec<u8> },
}

impl ImageSource {
    /// The image file and its name for messages.
    pub(crate) fn read(self) -> Result<(String, Vec<u8>), Unusable> {
        match self {
            ImageSource::Bytes { name, bytes } => Ok((name, bytes)),
            ImageSource::Files(paths) => {
                let (mut there, mut missing) = (None, None);
                for path in paths {
                    match fs::metadata(&path) {
                        Err(error) if is_of_the_row(&error) => missing = missing.or(Some(path)),
                        _ => {
                            there = Some(path);
                            break;
                        }
                    }
                }
                let path = there.or(missing).unwrap_or_default();
                Ok((path.display().to_string(), read_bounded(&path, MAX_IMAGE_BYTES)?))
            }
        }
    }
}

/// The contents of a file that could be a member of a shard, of at most `max` bytes.
pub(crate) fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, Unusable> {
    let refuse = |reason: String| Unusable::Row(format!("{}: {reason}", path.display()));
    let failed = |error: io::Error| match is_of_the_row(&error) {
        true => refuse(error.to_string()),
        false => Unusable::Machine(DataError::io(path)(error)),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    // A folder or a pipe of that name must not be waited for.
    if !metadata.is_file() {
        return Err(refuse("is no regular file".to_owned()));
    }
    if metadata.len() > max {
        return Err(refuse(format!("{} bytes; at most {max} are packed", metadata.len())));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    // Not by the length alone: some files of the system say that they are empty, and never end.
    let read = File::open(path).and_then(|file| file.take(max + 1).read_to_end(&mut bytes));
    match read.map_err(failed)? as u64 > max {
        true => Err(refuse(format!("it goes on behind the {max} bytes that are packed at most"))),
        false => Ok(bytes),
    }
}

/// Whether a file cannot be read because the row names one that is not there or cannot be: any other fault may have passed
/// the next time.
fn is_of_the_row(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound};
    // ELOOP has no kind.
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory | InvalidInput | InvalidFilename)
        || error.raw_os_error() == Some(40)
}

/// A caption, or a list of them.
pub(crate) fn captions(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_says_it_is_empty_is_not_read_for_ever() {
        // The memory map of this process: eight bytes for each page that it could have.
        let endless = Path::new("/proc/self/pagemap");
        assert_eq!(fs::metadata(endless).unwrap().len(), 0);
        // It is read by eights.
        let Err(Unusable::Row(reason)) = read_bounded(endless, 1023) else { panic!("it was read") };
        assert!(reason.contains("pagemap: it goes on behind the 1023 bytes"), "{reason}");
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), [7u8; 1000]).unwrap();
        assert!(read_bounded(&folder.path().join("a"), 1000).is_ok_and(|bytes| bytes == [7u8; 1000]));
    }

    #[test]
    fn what_may_have_passed_the_next_time_is_not_the_rows_fault() {
        let of = |code| is_of_the_row(&io::Error::from_raw_os_error(code));
        // ENOENT, ENOTDIR, ENAMETOOLONG, ELOOP; then EIO, ESTALE, ETIMEDOUT, EMFILE, EACCES.
        assert!([2, 20, 36, 40].into_iter().all(of));
        assert!(![5, 116, 110, 24, 13].into_iter().any(of));
    }
}
