//! A shard's index: where each sample's image and caption lie in the tar file, kept beside it as `NAME.tar.idx`.
//!
//! Two lines of JSON. The first is the header: format, version, length and modification time of the tar file (by
//! which a changed shard is noticed), the scan's version, counts, and the digest of the second line, which holds the
//! index itself. Where the whole tar file was read anyway, there is a digest of that too.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::shards::scan::{Problem, SCAN_VERSION, scan};
use crate::{DataError, atomic};

const FORMAT: &str = "blip2-shard-index";
const VERSION: u32 = 2;

/// No header of ours comes near.
const MAX_HEADER_BYTES: u64 = 1 << 16;
/// No longer index is read, of whatever shard.
const MAX_INDEX_BYTES: u64 = 1 << 32;

/// The longest image that is read.
pub(crate) const MAX_IMAGE_BYTES: u64 = 1 << 29;
/// The longest caption, and the longest metadata, that are read.
pub(crate) const MAX_TEXT_BYTES: u64 = 1 << 20;

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
    pub(crate) fn from_lower_case(name: &str) -> Option<Extension> {
        Self::ALL.into_iter().find(|extension| extension.name() == name)
    }

    /// The extension of that name, in any case.
    pub(crate) fn of(name: &str) -> Option<Extension> {
        Self::from_lower_case(&name.to_lowercase())
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
    pub(crate) fn is_image(self) -> bool {
        !matches!(self, Self::Txt | Self::Json)
    }

    /// The longest member of it that is read. A text becomes many times its length in memory when it is parsed.
    pub(crate) fn max_bytes(self) -> u64 {
        if self.is_image() { MAX_IMAGE_BYTES } else { MAX_TEXT_BYTES }
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

/// BLAKE3 of some bytes; 64 hexadecimal digits in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(blake3::Hash);

impl Digest {
    /// Of what is in memory.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(blake3::hash(bytes))
    }

    /// Of what `hasher` has seen.
    pub(crate) fn finish(hasher: &blake3::Hasher) -> Digest {
        Digest(hasher.finalize())
    }

    /// Of all that can be read from `source`.
    pub(crate) fn of_reader(source: impl io::Read) -> io::Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(source)?;
        Ok(Digest::finish(&hasher))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.to_hex().as_str().fmt(f)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Digest, String> {
        blake3::Hash::from_hex(&text).map(Digest).map_err(|error| format!("\"{text}\" is no digest: {error}"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// The first line of an index file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexHeader {
    format: String,
    version: u32,
    /// Of the scan that it was made by.
    #[serde(default)]
    scan: u32,
    /// Length of the tar file.
    pub tar_bytes: u64,
    /// Modification time of the tar file, since 1970.
    pub tar_mtime_ns: u64,
    /// Number of samples.
    pub samples: u64,
    /// Number of problems.
    pub problems: u64,
    /// Of the second line.
    pub digest: Digest,
    /// Of the whole tar file, where it was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tar_digest: Option<Digest>,
}

/// Where the index files of shards lie, and go.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Whether they may be written beside their shards.
    pub(crate) write_beside: bool,
    /// Where they go else.
    pub(crate) elsewhere: Option<PathBuf>,
}

impl Places {
    /// Beside the shards, or in `elsewhere`.
    fn beside_or(elsewhere: Option<&Path>) -> Places {
        Places { write_beside: true, elsewhere: elsewhere.map(Path::to_owned) }
    }

    /// Where what belongs to a shard may lie: beside it, then elsewhere.
    pub(crate) fn of(&self, path: &Path) -> Vec<PathBuf> {
        [Some(beside(path)), self.elsewhere_of(path)].into_iter().flatten().collect()
    }

    /// Where it may be written, in this order.
    pub(crate) fn writable(&self, path: &Path) -> Vec<PathBuf> {
        let beside = self.write_beside.then(|| beside(path));
        [beside, self.elsewhere_of(path)].into_iter().flatten().collect()
    }

    fn elsewhere_of(&self, path: &Path) -> Option<PathBuf> {
        self.elsewhere.as_deref().map(|dir| cached(path, dir))
    }
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
        Self::open_in(path, &Places::beside_or(cache_dir))
    }

    /// As [`IndexedShard::open`], with the index in other places.
    pub(crate) fn open_in(path: &Path, places: &Places) -> Result<IndexedShard, DataError> {
        let stamp = Stamp::of(path).map_err(DataError::io(path))?;
        let mut tar_digest = None;
        for index_path in places.of(path) {
            let Some(header) = read_header(&index_path).filter(|header| header.fits(&stamp)) else { continue };
            if header.scan >= SCAN_VERSION {
                let path = path.to_owned();
                return Ok(IndexedShard { path, index_path, header });
            }
            // An older scan may have found other samples in the same file.
            tar_digest = tar_digest.or(header.tar_digest);
        }
        Self::build(path, places, |_| Ok(tar_digest))
    }

    /// Reads the shard at `path` whole, and builds and writes its index anew with a digest of the shard.
    ///
    /// # Errors
    /// As [`IndexedShard::open`].
    pub(crate) fn rebuild(path: &Path, places: &Places) -> Result<IndexedShard, DataError> {
        Self::build(path, places, |path| Digest::of_reader(File::open(path)?).map(Some))
    }

    /// Builds the index of a shard that was written just now, whose digest is known.
    pub(crate) fn of_written(path: &Path, tar_digest: Digest) -> Result<IndexedShard, DataError> {
        Self::build(path, &Places::beside_or(None), |_| Ok(Some(tar_digest)))
    }

    fn build(
        path: &Path,
        places: &Places,
        digest: impl FnOnce(&Path) -> io::Result<Option<Digest>>,
    ) -> Result<IndexedShard, DataError> {
        // The stamp is taken before the scan: a shard that changes meanwhile does not fit its index.
        let stamp = Stamp::of(path).map_err(DataError::io(path))?;
        let index = scan(path)?;
        let (header, file) = encode(&index, &stamp, digest(path).map_err(DataError::io(path))?);
        let mut refused = io::Error::other("no folder is named for it");
        let mut last = beside(path);
        for place in places.writable(path) {
            match atomic::write_own(&place, FORMAT, &file) {
                Ok(()) => return Ok(IndexedShard { path: path.to_owned(), index_path: place, header }),
                Err(error) => (last, refused) = (place, error),
            }
        }
        Err(DataError::IndexNotWritable { shard: path.to_owned(), path: last, source: refused })
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
        let (mut file, most) = (Vec::new(), longest(self.header.tar_bytes));
        let read = File::open(&self.index_path).and_then(|index| index.take(most + 1).read_to_end(&mut file));
        if read.map_err(DataError::io(&self.index_path))? as u64 > most {
            return Err(bad(format!("it has more than the {most} bytes that an index of such a shard can have")));
        }
        let body = file.iter().position(|&byte| byte == b'\n').map(|end| &file[end + 1..]);
        let body = body.ok_or_else(|| bad("it has no second line".to_owned()))?;
        self.header.index_in(body).map_err(bad)
    }
}

impl Index {
    /// The second line of its file.
    fn body(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Of its file's second line.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(self.body().as_bytes())
    }
}

/// What says that a file is the one that was indexed.
pub(crate) struct Stamp {
    pub(crate) bytes: u64,
    pub(crate) mtime_ns: u64,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> io::Result<Stamp> {
        let metadata = fs::metadata(path)?;
        let mtime = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Stamp { bytes: metadata.len(), mtime_ns: mtime.as_nanos() as u64 })
    }
}

impl IndexHeader {
    fn fits(&self, stamp: &Stamp) -> bool {
        self.is_of_length(stamp.bytes) && self.tar_mtime_ns == stamp.mtime_ns
    }

    fn is_of_length(&self, tar_bytes: u64) -> bool {
        self.format == FORMAT && self.version == VERSION && self.tar_bytes == tar_bytes
    }

    /// The index in a file's second line.
    fn index_in(&self, body: &[u8]) -> Result<Index, String> {
        if Digest::of(body) != self.digest {
            return Err("its digest is not the one in its header".to_owned());
        }
        let index: Index = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let outside = |member: &Member| member.offset.checked_add(member.bytes).is_none_or(|end| end > self.tar_bytes);
        if index.samples.len() as u64 != self.samples {
            return Err(format!("{} samples where the header says {}", index.samples.len(), self.samples));
        }
        match index.samples.iter().find(|sample| sample.members().any(outside)) {
            Some(sample) => Err(format!("key {} lies outside the shard", sample.key)),
            None => Ok(index),
        }
    }
}

/// The longest index file of a shard of that length. What it says of a sample takes less than the two blocks of the sample's headers do,
/// but for names, which may be escaped.
pub(crate) fn longest(tar_bytes: u64) -> u64 {
    tar_bytes.saturating_mul(8).saturating_add(MAX_HEADER_BYTES).min(MAX_INDEX_BYTES)
}

/// Header and index of an index file that was fetched, where they are whole, of a shard of that length, and not of an
/// older scan.
#[cfg_attr(not(feature = "remote"), expect(dead_code))]
pub(crate) fn decode(file: &[u8], tar_bytes: u64) -> Option<(IndexHeader, Index)> {
    let end = file.iter().position(|&byte| byte == b'\n')?;
    let header: IndexHeader = serde_json::from_slice(&file[..end]).ok()?;
    let fits = header.is_of_length(tar_bytes) && header.scan >= SCAN_VERSION;
    let index = fits.then(|| header.index_in(&file[end + 1..]).ok())??;
    Some((header, index))
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
    BufReader::new(File::open(path).ok()?.take(MAX_HEADER_BYTES)).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

fn encode(index: &Index, stamp: &Stamp, tar_digest: Option<Digest>) -> (IndexHeader, Vec<u8>) {
    let body = index.body();
    let header = IndexHeader {
        format: FORMAT.to_owned(),
        version: VERSION,
        scan: SCAN_VERSION,
        tar_bytes: stamp.bytes,
        tar_mtime_ns: stamp.mtime_ns,
        samples: index.samples.len() as u64,
        problems: index.problems.len() as u64,
        digest: Digest::of(body.as_bytes()),
        tar_digest,
    };
    let file = format!("{}\n{body}", serde_json::json!(header));
    (header, file.into_bytes())
}
