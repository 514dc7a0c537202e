//! One view of one shard: a header line, a record a sample, and payloads of one length at computed offsets.
//!
//! ```text
//! 0                  header, JSON padded with spaces and ended by a line break     4096 bytes
//! 4096               records: checksum, image, writer, position (u64 each)         32 bytes a sample
//! next 4096          payloads                                                      row_bytes a sample
//! ```
//!
//! All numbers are little-endian. The file has its full length from the start and holes where nothing was written. A row is written payload
//! first; its record's checksum covers both, so that whatever a crash, a full disk or two writers at once leave behind is no row.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::description::{MAX_ROW_BYTES, NAME_DIGITS};
use crate::Shard;

const FORMAT: &str = "blip2-features";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
pub(super) const RECORD_BYTES: u64 = 32;
/// In front of the digest, so that no name is longer than a file system takes.
const MAX_NAME_BYTES: usize = 160;
/// The most samples that are believed: the index of a shard with more would not fit in memory either.
const MAX_SAMPLES: u64 = 1 << 24;
/// The end of every file's name.
pub(super) const EXTENSION: &str = "feat";
/// The beginning of the name of a file that is being made.
pub(super) const UNFINISHED: &str = ".writing-";

/// The first line of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ShardHeader {
    format: String,
    version: u32,
    pub(super) key: String,
    pub(super) shard: String,
    pub(super) digest: String,
    pub(super) view: u64,
    pub(super) samples: u64,
    pub(super) row_bytes: u64,
}

impl ShardHeader {
    pub(super) fn new(key: &str, shard: &Shard, view: u64, row_bytes: usize) -> ShardHeader {
        ShardHeader {
            format: FORMAT.to_owned(),
            version: VERSION,
            key: key.to_owned(),
            shard: shard.name(),
            digest: shard_digest(shard),
            view,
            samples: shard.samples,
            row_bytes: row_bytes as u64,
        }
    }

    /// `00000.tar.0123456789abcdef.v0.feat`
    pub(super) fn file_name(shard: &Shard, view: u64) -> String {
        let mut name = shard.name();
        name.truncate(name.floor_char_boundary(MAX_NAME_BYTES));
        format!("{name}.{}.v{view}.{EXTENSION}", shard_digest(shard))
    }

    fn encode(&self) -> Vec<u8> {
        let mut line = serde_json::json!(self).to_string().into_bytes();
        line.resize(HEADER_BYTES as usize - 1, b' ');
        line.push(b'\n');
        line
    }

    /// The header of a file; `None` where it is none of this format.
    pub(super) fn read(file: &File) -> io::Result<Option<ShardHeader>> {
        let mut bytes = vec![0; HEADER_BYTES as usize];
        match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let header: Option<ShardHeader> = serde_json::from_slice(&bytes).ok();
        // Lengths from a file are not trusted: they decide about offsets and memory.
        Ok(header.filter(|header| header.encode() == bytes && header.file_bytes().is_some()))
    }

    fn payloads(&self) -> Option<u64> {
        let records = self.samples.checked_mul(RECORD_BYTES)?;
        records.checked_add(HEADER_BYTES)?.checked_next_multiple_of(HEADER_BYTES)
    }

    fn file_bytes(&self) -> Option<u64> {
        if self.row_bytes > MAX_ROW_BYTES || self.samples > MAX_SAMPLES {
            return None;
        }
        let bytes = self.payloads()?.checked_add(self.samples.checked_mul(self.row_bytes)?)?;
        (bytes <= i64::MAX as u64).then_some(bytes)
    }
}

/// Names a shard by its members and its length, wherever it lies.
fn shard_digest(shard: &Shard) -> String {
    let line = format!("{}\0{}", shard.index, shard.bytes);
    let mut digest = blake3::hash(line.as_bytes()).to_hex().to_string();
    digest.truncate(NAME_DIGITS);
    digest
}

/// The features of one view of one image, as they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRow {
    /// Digest of the image file.
    pub image: u64,
    /// Who wrote it; see [`super::Writer::id`].
    pub writer: u64,
    /// First stream position of the micro-batch that it was encoded with, or the one of the evaluation.
    pub position: u64,
    /// The numbers; see [`super::FeatureFormat`].
    pub payload: Vec<u8>,
}

/// What is stored beside a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    checksum: u64,
    pub(super) image: u64,
    writer: u64,
    position: u64,
}

impl Record {
    fn of(row: &StoredRow, ordinal: u64) -> Record {
        let StoredRow { image, writer, position, payload } = row;
        let fields = [*image, *writer, *position, ordinal].map(u64::to_le_bytes).concat();
        // Zero is what a hole reads as.
        let checksum = xxh3_64_with_seed(payload, xxh3_64(&fields)).max(1);
        Record { checksum, image: *image, writer: *writer, position: *position }
    }

    fn from_bytes(bytes: &[u8; RECORD_BYTES as usize]) -> Record {
        let number = |at: usize| bytes[8 * at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk));
        Record { checksum: number(0), image: number(1), writer: number(2), position: number(3) }
    }

    fn to_bytes(self) -> Vec<u8> {
        [self.checksum, self.image, self.writer, self.position].map(u64::to_le_bytes).concat()
    }

    /// Whether nothing was ever written there.
    pub(super) fn is_absent(self) -> bool {
        self.checksum == 0
    }
}

/// What to do where there is no file, or one that is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing.
    Existing,
    /// Put a new one there.
    Create,
}

/// An open file.
pub(super) struct ShardFile {
    file: File,
    pub(super) header: ShardHeader,
    writable: bool,
}

impl ShardFile {
    /// The file at `path`, where it has this header.
    pub(super) fn open(path: &Path, header: &ShardHeader, access: Access) -> io::Result<Option<ShardFile>> {
        let damaged = match Self::open_any(path)? {
            Some(file) if file.header == *header => return Ok(Some(file)),
            _ if access == Access::Existing => return Ok(None),
            _ => path.exists(),
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut temporary =
            tempfile::Builder::new().prefix(UNFINISHED).permissions(crate::atomic::mode()).tempfile_in(folder)?;
        temporary.write_all(&header.encode())?;
        temporary.as_file().set_len(header.file_bytes().ok_or(ErrorKind::FileTooLarge)?)?;
        if damaged {
            temporary.persist(path).map_err(|error| error.error)?;
        } else if let Err(error) = temporary.persist_noclobber(path)
            // Another process was first: its file is as good.
            && error.error.kind() != ErrorKind::AlreadyExists
        {
            return Err(error.error);
        }
        Ok(Self::open_any(path)?.filter(|file| file.header == *header))
    }

    /// The file at `path`; `None` where there is none or it has no header of this format.
    pub(super) fn open_any(path: &Path) -> io::Result<Option<ShardFile>> {
        let open = |write| OpenOptions::new().read(true).write(write).open(path);
        let (file, writable) = match open(true) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // A cache that others made may be read all the same.
            Err(_) => (open(false)?, false),
        };
        let header = ShardHeader::read(&file)?;
        Ok(header.map(|header| ShardFile { file, header, writable }))
    }

    /// The row of a sample, where it is whole and of this image.
    pub(super) fn read(&self, ordinal: u64, image: u64) -> Option<StoredRow> {
        let record = self.record(ordinal).filter(|record| !record.is_absent() && record.image == image)?;
        self.row(ordinal, record)
    }

    /// Whether a row of this image was written; the payload is not looked at.
    pub(super) fn holds(&self, ordinal: u64, image: u64) -> bool {
        self.record(ordinal).is_some_and(|record| !record.is_absent() && record.image == image)
    }

    /// The payload that belongs to a record; `None` where it is not the one that was written.
    pub(super) fn row(&self, ordinal: u64, record: Record) -> Option<StoredRow> {
        let mut payload = vec![0; self.header.row_bytes as usize];
        self.file.read_exact_at(&mut payload, self.payload_at(ordinal)).ok()?;
        let Record { image, writer, position, .. } = record;
        let row = StoredRow { image, writer, position, payload };
        (Record::of(&row, ordinal) == record).then_some(row)
    }

    fn record(&self, ordinal: u64) -> Option<Record> {
        let mut bytes = [0; RECORD_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.record_at(ordinal)?).ok()?;
        Some(Record::from_bytes(&bytes))
    }

    /// All records, in the samples' order; those behind the end of a file that was cut are absent.
    pub(super) fn records(&self) -> io::Result<impl Iterator<Item = Record>> {
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 20];
        let end = HEADER_BYTES + self.header.samples * RECORD_BYTES;
        while HEADER_BYTES + (bytes.len() as u64) < end {
            let at = HEADER_BYTES + bytes.len() as u64;
            let want = (end - at).min(chunk.len() as u64) as usize;
            match self.file.read_at(&mut chunk[..want], at)? {
                0 => break,
                read => bytes.extend_from_slice(&chunk[..read]),
            }
        }
        let records: Vec<Record> = bytes.as_chunks().0.iter().map(Record::from_bytes).collect();
        Ok(records.into_iter())
    }

    /// Payload first, record last.
    pub(super) fn write(&self, ordinal: u64, row: &StoredRow) -> io::Result<()> {
        if !self.writable {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let record_at = self.record_at(ordinal).ok_or(ErrorKind::InvalidInput)?;
        if row.payload.len() as u64 != self.header.row_bytes {
            return Err(ErrorKind::InvalidInput.into());
        }
        self.file.write_all_at(&row.payload, self.payload_at(ordinal))?;
        self.file.write_all_at(&Record::of(row, ordinal).to_bytes(), record_at)
    }

    /// Makes a row absent.
    pub(super) fn clear(&self, ordinal: u64) -> io::Result<()> {
        if !self.writable {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let at = self.record_at(ordinal).ok_or(ErrorKind::InvalidInput)?;
        self.file.write_all_at(&[0; RECORD_BYTES as usize], at)
    }

    /// Bytes that it takes on the disk.
    pub(super) fn disk_bytes(&self) -> io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&self.file.metadata()?) * 512)
    }

    fn record_at(&self, ordinal: u64) -> Option<u64> {
        (ordinal < self.header.samples).then(|| HEADER_BYTES + ordinal * RECORD_BYTES)
    }

    fn payload_at(&self, ordinal: u64) -> u64 {
        // Checked for the whole file when its header was made or read.
        self.header.payloads().unwrap_or(0) + ordinal * self.header.row_bytes
    }
}
