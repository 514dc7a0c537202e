//! A shard's index: where each sample's image and caption lie in the tar file, kept beside it as `NAME.tar.idx`.
//!
//! Two lines of JSON. The first is the header: format, version, length and modification time of the tar file (by
//! which a changed shard is noticed), counts, and the digest of the second line, which holds the index itself.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::scan::{Problem, scan};
use crate::{DataError, atomic};

const FORMAT: &str = "blip2-shard-index";
const VERSION: u32 = 2;

/// The members that a sample is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Extension {
    /// JPEG.
    Jpg,
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
    /// WebP.
    Webp,
    /// The caption as plain text.
    Txt,
    /// An object with the caption among its fields.
    Json,
}

impl Extension {
    const ALL: [Extension; 6] = [Self::Jpg, Self::Jpeg, Self::Png, Self::Webp, Self::Txt, Self::Json];

    /// The extension of that name.
    pub fn from_lower_case(name: &str) -> Option<Extension> {
        Self::ALL.into_iter().find(|extension| extension.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jpg => "jpg",
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::Webp => "webp",
            Self::Txt => "txt",
            Self::Json => "json",
        }
    }

    /// Whether it says that the member is an image; otherwise it is a caption.
    pub fn is_image(self) -> bool {
        !matches!(self, Self::Txt | Self::Json)
    }
}

/// Where a member's data lies in the tar file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64, Extension)", into = "(u64, u64, Extension)")]
pub struct Member {
    /// First byte of its data.
    pub offset: u64,
    /// Length of its data.
    pub bytes: u64,
    /// What it is.
    pub extension: Extension,
}

impl From<(u64, u64, Extension)> for Member {
    fn from((offset, bytes, extension): (u64, u64, Extension)) -> Self {
        Self { offset, bytes, extension }
    }
}

impl From<Member> for (u64, u64, Extension) {
    fn from(member: Member) -> Self {
        (member.offset, member.bytes, member.extension)
    }
}

/// A sample with both its parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexedSample {
    /// Its key: unique among its neighbours, not always in the shard.
    pub key: String,
    /// Its image.
    pub image: Member,
    /// Its caption: the `.txt` member, where there is none the `.json` member.
    pub caption: Member,
    /// The `.json` member that stands beside a `.txt` member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<Member>,
}

impl IndexedSample {
    /// The `.txt` member.
    pub(crate) fn text(&self) -> Option<&Member> {
        Some(&self.caption).filter(|caption| caption.extension == Extension::Txt)
    }

    /// The `.json` member.
    pub(crate) fn metadata(&self) -> Option<&Member> {
        self.json.as_ref().or(Some(&self.caption)).filter(|member| member.extension == Extension::Json)
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        [&self.image, &self.caption].into_iter().chain(&self.json)
    }
}

/// The samples of one shard, and what in it cannot be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// In the order of the tar file.
    pub samples: Vec<IndexedSample>,
    /// Keys that lack a part, and where the file is cut.
    pub problems: Vec<Problem>,
}

/// The first line of an index file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexHeader {
    format: String,
    version: u32,
    /// Length of the tar file.
    pub tar_bytes: u64,
    /// Modification time of the tar file, since 1970.
    pub tar_mtime_ns: u64,
    /// Number of samples.
    pub samples: u64,
    /// Number of problems.
    pub problems: u64,
    /// BLAKE3 of the second line.
    pub digest: String,
}

/// A shard with its index file in place.
#[derive(Debug, Clone)]
pub struct IndexedShard {
    /// The tar file.
    pub path: PathBuf,
    /// The index file.
    pub index_path: PathBuf,
    /// The index file's header.
    pub header: IndexHeader,
}

impl IndexedShard {
    /// The shard at `path`, its index taken from beside it or from `cache_dir` if it is there and fits the shard,
    /// else built and written: beside the shard, or into `cache_dir` when that folder is read-only.
    ///
    /// # Errors
    /// When the shard is no readable tar file, or its index can be written nowhere.
    pub fn open(path: &Path, cache_dir: Option<&Path>) -> Result<IndexedShard, DataError> {
        let stamp = Stamp::of(path).map_err(DataError::io(path))?;
        let places = [Some(beside(path)), cache_dir.map(|dir| cached(path, dir))];
        for index_path in places.into_iter().flatten() {
            if let Some(header) = read_header(&index_path).filter(|header| header.fits(&stamp)) {
                let path = path.to_owned();
                return Ok(IndexedShard { path, index_path, header });
            }
        }
        Self::rebuild(path, cache_dir)
    }

    /// Builds the index of the shard at `path` anew and writes it beside the shard, or into `cache_dir` when that
    /// folder is read-only.
    ///
    /// # Errors
    /// As [`IndexedShard::open`].
    pub fn rebuild(path: &Path, cache_dir: Option<&Path>) -> Result<IndexedShard, DataError> {
        // The stamp is taken before the scan: a shard that changes meanwhile does not fit its index.
        let stamp = Stamp::of(path).map_err(DataError::io(path))?;
        let (header, file) = encode(&scan(path)?, &stamp);
        let write = |index_path: PathBuf| match atomic::write(&index_path, |out| out.write_all(&file)) {
            Ok(()) => Ok(IndexedShard { path: path.to_owned(), index_path, header: header.clone() }),
            Err(source) => Err(DataError::IndexNotWritable { shard: path.to_owned(), path: index_path, source }),
        };
        match (write(beside(path)), cache_dir) {
            (Err(_), Some(dir)) => write(cached(path, dir)),
            (result, _) => result,
        }
    }

    /// Where the shard's attributes may lie: beside its index, or in `cache_dir` when that folder is read-only.
    pub(crate) fn attributes_places(&self, cache_dir: Option<&Path>) -> Vec<PathBuf> {
        let elsewhere = cache_dir.map(|dir| cached(&self.path, dir).with_extension("attributes"));
        [Some(self.index_path.with_extension("attributes")), elsewhere].into_iter().flatten().collect()
    }

    /// The shard's file name.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Reads the index.
    ///
    /// # Errors
    /// When the index file changed since it was opened, or is damaged.
    pub fn load(&self) -> Result<Index, DataError> {
        let bad = |reason: String| DataError::BadIndex { shard: self.path.clone(), reason };
        let file = fs::read(&self.index_path).map_err(DataError::io(&self.index_path))?;
        let body = file.iter().position(|&byte| byte == b'\n').map(|end| &file[end + 1..]);
        let body = body.ok_or_else(|| bad("it has no second line".to_owned()))?;
        if blake3::hash(body).to_hex().as_str() != self.header.digest {
            return Err(bad("its digest is not the one in its header".to_owned()));
        }
        let index: Index = serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
        let outside =
            |member: &Member| member.offset.checked_add(member.bytes).is_none_or(|end| end > self.header.tar_bytes);
        if index.samples.len() as u64 != self.header.samples {
            return Err(bad(format!("{} samples where the header says {}", index.samples.len(), self.header.samples)));
        }
        match index.samples.iter().find(|sample| sample.members().any(outside)) {
            Some(sample) => Err(bad(format!("key {} lies outside the shard", sample.key))),
            None => Ok(index),
        }
    }
}

/// What says that a file is the one that was indexed.
struct Stamp {
    bytes: u64,
    mtime_ns: u64,
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Stamp> {
        let metadata = fs::metadata(path)?;
        let mtime = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Stamp { bytes: metadata.len(), mtime_ns: mtime.as_nanos() as u64 })
    }
}

impl IndexHeader {
    fn fits(&self, stamp: &Stamp) -> bool {
        self.format == FORMAT
            && self.version == VERSION
            && (self.tar_bytes, self.tar_mtime_ns) == (stamp.bytes, stamp.mtime_ns)
    }
}

/// `00000.tar` -> `00000.tar.idx`
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".idx");
    PathBuf::from(name)
}

/// Shards of one name in two folders get two names in the cache.
fn cached(path: &Path, cache_dir: &Path) -> PathBuf {
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let digest = blake3::hash(place.as_os_str().as_encoded_bytes()).to_hex();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    cache_dir.join(format!("{name}.{}.idx", &digest.as_str()[..16]))
}

fn read_header(path: &Path) -> Option<IndexHeader> {
    let mut line = String::new();
    // A file that is missing or is no index is not an error: the index is built.
    BufReader::new(File::open(path).ok()?).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

fn encode(index: &Index, stamp: &Stamp) -> (IndexHeader, Vec<u8>) {
    let body = serde_json::json!(index).to_string();
    let header = IndexHeader {
        format: FORMAT.to_owned(),
        version: VERSION,
        tar_bytes: stamp.bytes,
        tar_mtime_ns: stamp.mtime_ns,
        samples: index.samples.len() as u64,
        problems: index.problems.len() as u64,
        digest: blake3::hash(body.as_bytes()).to_hex().to_string(),
    };
    let file = format!("{}\n{body}", serde_json::json!(header));
    (header, file.into_bytes())
}
