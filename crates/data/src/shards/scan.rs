//! One pass over a tar shard's headers: which bytes are which sample, by WebDataset's naming.
//!
//! A member's key is its path up to the first dot of the file name, its extension what follows, in lower case.
//! Consecutive members with one key are one sample. Directories, hidden files, `__meta__` names and extensions that
//! are neither image nor caption are passed over, also between the members of a sample. Shards are never joined, so
//! neither are samples across them.

use std::fmt;
use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::shards::index::{Extension, Index, IndexedSample, Member};
use crate::shards::members::{BLOCK, Ending, MemberKind, TarMember, walk};

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
            key => {
                // A key is whatever a tar file calls a member; a line is a line.
                let key = key.replace(['\n', '\r'], " ");
                write!(f, "shard {}, key {key}: {}", self.shard, self.reason)
            }
        }
    }
}

/// Raised whenever a scan finds other samples or problems in the same file: indices of an older one are built anew.
pub(crate) const SCAN_VERSION: u32 = 1;

pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Reads every header of the tar file at `path`. Members behind a cut or a damaged header are lost and said to be so;
/// those in front of it count.
///
/// # Errors
/// When the file cannot be read, has zero bytes, is a Git LFS pointer, or is no tar archive from its start.
pub fn scan(path: &Path) -> Result<Index, DataError> {
    scan_file(&File::open(path).map_err(DataError::io(path))?, path)
}

/// As [`scan`], for a file that is open and known under another path.
pub(crate) fn scan_file(file: &File, path: &Path) -> Result<Index, DataError> {
    let bytes = file.metadata().map_err(DataError::io(path))?.len();
    refuse_what_is_no_tar(path, file, bytes)?;
    let shard = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut samples = Samples::new(shard);
    match walk(file, |member| samples.member(&member)).map_err(DataError::io(path))? {
        Ending::Whole => {}
        Ending::NoArchive(reason) => return Err(DataError::NotATar { path: path.to_owned(), reason }),
        Ending::Broken(reason) => samples.problem("", reason),
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
    /// Why an image or a caption that has a name here is none.
    elsewhere: Option<String>,
}

impl Samples {
    fn new(shard: String) -> Self {
        Self { shard, open: None, index: Index::default() }
    }

    fn problem(&mut self, key: &str, reason: String) {
        self.index.problems.push(Problem { shard: self.shard.clone(), key: key.to_owned(), reason });
    }

    fn member(&mut self, member: &TarMember) {
        let Some((key, extension)) = member.part() else {
            if matches!(member.kind, MemberKind::File) && std::str::from_utf8(&member.path).is_err() {
                let name = String::from_utf8_lossy(&member.path).into_owned();
                self.problem(&name, "the member's name is not UTF-8".to_owned());
            }
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
            elsewhere: None,
        });
        let Some(extension) = Extension::of(extension) else { return };
        let slot = match extension {
            Extension::Txt => &mut open.text,
            Extension::Json => &mut open.json,
            _ => &mut open.image,
        };
        match (&member.kind, slot) {
            (MemberKind::Elsewhere(what), None) => {
                open.elsewhere = Some(format!("its {} is {what}", extension.name()));
            }
            (MemberKind::File, Some(there)) if there.extension == extension => {
                open.flaw = Some(format!("two members with extension {}", extension.name()));
            }
            (MemberKind::File, free @ None) => {
                *free = Some(Member { offset: member.data, bytes: member.end - member.data, extension });
            }
            // The first image counts.
            _ => {}
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
                self.problem(&open.key, open.elsewhere.unwrap_or_else(|| reason.to_owned()));
            }
        }
    }

    fn finish(mut self) -> Index {
        self.close();
        self.index
    }
}

impl TarMember {
    /// Key and extension, where the member is part of a sample. What is no file counts only in the place of an image or
    /// a caption.
    pub(crate) fn part(&self) -> Option<(&str, &str)> {
        let part = split_key(std::str::from_utf8(&self.path).ok()?)?;
        match self.kind {
            MemberKind::File => Some(part),
            MemberKind::Elsewhere(_) => Some(part).filter(|(_, extension)| Extension::of(extension).is_some()),
            MemberKind::Other => None,
        }
    }
}

/// Key and extension in a member's name.
fn split_key(path: &str) -> Option<(&str, &str)> {
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
