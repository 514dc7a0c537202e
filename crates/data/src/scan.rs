//! One pass over a tar shard's headers: which bytes are which sample, by WebDataset's naming.
//!
//! A member's key is its path up to the first dot of the file name, its extension what follows, in lower case.
//! Consecutive members with one key are one sample. Directories, hidden files, `__meta__` names and extensions that
//! are neither image nor caption are passed over. Shards are never joined, so neither are samples across them.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::index::{Extension, Index, IndexedSample, Member};

/// Something in a shard that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The shard's file name.
    pub shard: String,
    /// The sample's key; empty where the shard itself is meant.
    pub key: String,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "shard {}: {}", self.shard, self.reason),
            key => write!(f, "shard {}, key {key}: {}", self.shard, self.reason),
        }
    }
}

pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";
const BLOCK: u64 = 512;

/// Reads every header of the tar file at `path`. Members behind a cut or a damaged header are lost and said to be so;
/// those in front of it count.
///
/// # Errors
/// When the file cannot be read, has zero bytes, is a Git LFS pointer, or is no tar archive from its start.
pub fn scan(path: &Path) -> Result<Index, DataError> {
    scan_file(&File::open(path).map_err(DataError::io(path))?, path)
}

/// As [`scan`], for a file that is open and known under another path.
pub(crate) fn scan_file(mut file: &File, path: &Path) -> Result<Index, DataError> {
    let bytes = file.metadata().map_err(DataError::io(path))?.len();
    refuse_what_is_no_tar(path, file, bytes)?;
    file.rewind().map_err(DataError::io(path))?;

    let shard = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut samples = Samples::new(shard);
    let mut archive = tar::Archive::new(file);
    // Where the archive would go on after the last whole member.
    let mut end = 0;
    for (position, entry) in archive.entries_with_seek().map_err(DataError::io(path))?.enumerate() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if position == 0 => {
                return Err(DataError::NotATar { path: path.to_owned(), reason: one_line(&error) });
            }
            Err(error) => {
                let reason = format!("damaged or cut at byte {end}, what follows is lost: {}", one_line(&error));
                samples.problem("", reason);
                end = u64::MAX;
                break;
            }
        };
        let (offset, size) = (entry.raw_file_position(), entry.size());
        let data_end = offset.saturating_add(size);
        if data_end > bytes {
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            samples.problem("", format!("cut at byte {bytes}, inside member {name}; it and what follows are lost"));
            end = u64::MAX;
            break;
        }
        end = data_end.next_multiple_of(BLOCK);
        let kind = entry.header().entry_type();
        if kind.is_file() || kind.is_contiguous() {
            samples.member(&entry.path_bytes(), offset, size);
        }
    }
    if end != u64::MAX && end >= bytes {
        samples.problem("", "has no end-of-archive mark: it may have been cut between two members".to_owned());
    }
    Ok(samples.finish())
}

fn refuse_what_is_no_tar(path: &Path, file: &File, bytes: u64) -> Result<(), DataError> {
    use std::os::unix::fs::FileExt;
    let path = path.to_owned();
    if bytes == 0 {
        return Err(DataError::EmptyShard { path });
    }
    let mut head = vec![0; LFS_POINTER.len().min(bytes as usize)];
    file.read_exact_at(&mut head, 0).map_err(DataError::io(&path))?;
    if head == LFS_POINTER {
        return Err(DataError::GitLfsPointer { path });
    }
    let reason = match head.as_slice() {
        [0x1F, 0x8B, ..] => "it is compressed with gzip; unpack it first".to_owned(),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => "it is compressed with zstd; unpack it first".to_owned(),
        _ if bytes < BLOCK => format!("it has {bytes} bytes, less than one header"),
        _ => return Ok(()),
    };
    Err(DataError::NotATar { path, reason })
}

fn one_line(error: &io::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Groups members into samples as they pass.
struct Samples {
    shard: String,
    open: Option<OpenSample>,
    index: Index,
}

struct OpenSample {
    key: String,
    image: Option<Member>,
    text: Option<Member>,
    json: Option<Member>,
    flaw: Option<String>,
}

impl Samples {
    fn new(shard: String) -> Self {
        Self { shard, open: None, index: Index::default() }
    }

    fn problem(&mut self, key: &str, reason: String) {
        self.index.problems.push(Problem { shard: self.shard.clone(), key: key.to_owned(), reason });
    }

    fn member(&mut self, path: &[u8], offset: u64, bytes: u64) {
        let Ok(path) = std::str::from_utf8(path) else {
            let name = String::from_utf8_lossy(path).into_owned();
            return self.problem(&name, "the member's name is not UTF-8".to_owned());
        };
        let Some((key, extension)) = split_key(path) else {
            return;
        };
        if self.open.as_ref().is_none_or(|open| open.key != key) {
            self.close();
        }
        let open = self.open.get_or_insert_with(|| OpenSample {
            key: key.to_owned(),
            image: None,
            text: None,
            json: None,
            flaw: None,
        });
        let Some(extension) = Extension::from_lower_case(&extension.to_lowercase()) else {
            return;
        };
        let member = Member { offset, bytes, extension };
        let slot = match extension {
            Extension::Txt => &mut open.text,
            Extension::Json => &mut open.json,
            _ => &mut open.image,
        };
        match slot {
            Some(there) if there.extension == extension => {
                open.flaw = Some(format!("two members with extension {}", extension.name()));
            }
            // The first image counts.
            Some(_) => {}
            None => *slot = Some(member),
        }
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        // A .txt goes before a .json.
        let (caption, json) = if open.text.is_some() { (open.text, open.json) } else { (open.json, None) };
        match (open.flaw, open.image, caption) {
            (Some(flaw), ..) => self.problem(&open.key, flaw),
            (None, Some(image), Some(caption)) => {
                self.index.samples.push(IndexedSample { key: open.key, image, caption, json })
            }
            (None, image, caption) => {
                let reason = match (image, caption) {
                    (None, None) => "neither image (jpg, jpeg, png, webp) nor caption (txt, json)",
                    (None, _) => "no image (jpg, jpeg, png, webp)",
                    _ => "no caption (txt, json)",
                };
                self.problem(&open.key, reason.to_owned());
            }
        }
    }

    fn finish(mut self) -> Index {
        self.close();
        self.index
    }
}

/// Key and extension of a member, where it is part of a sample.
pub(crate) fn split_key(path: &str) -> Option<(&str, &str)> {
    let name_start = path.rfind('/').map_or(0, |slash| slash + 1);
    let name = &path[name_start..];
    let dot = name.find('.').filter(|&dot| dot > 0)?;
    if name.starts_with("__") && name.ends_with("__") {
        return None;
    }
    Some((&path[..name_start + dot], &name[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_end_at_the_first_dot_of_the_file_name() {
        for (path, expected) in [
            ("a.jpg", Some(("a", "jpg"))),
            ("v1.2/b.seg.PNG", Some(("v1.2/b", "seg.PNG"))),
            ("./c.txt", Some(("./c", "txt"))),
            ("dir/.hidden", None),
            ("noext", None),
            ("__meta.v1__", None),
        ] {
            assert_eq!(split_key(path), expected, "{path}");
        }
    }
}
