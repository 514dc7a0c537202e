//! The members of a tar archive one after the other, from their headers alone.
//!
//! The scan and the repair both see a shard through this, so they agree on which bytes are which member.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use tar::EntryType;

/// What headers and data begin at multiples of.
pub(crate) const BLOCK: u64 = 512;
/// The longest headers of one member: long names and PAX records are read into memory.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// The longest padding behind the end mark. Tape blocks are filled up, mostly to 10 KiB.
const MAX_PADDING: u64 = 1 << 20;

/// A member of an archive.
pub(crate) struct TarMember {
    /// Its first header block: long names have headers of their own in front.
    pub(crate) start: u64,
    /// First byte of its data.
    pub(crate) data: u64,
    /// The byte behind its data.
    pub(crate) end: u64,
    /// Its name.
    pub(crate) path: Vec<u8>,
    /// What it is.
    pub(crate) kind: MemberKind,
}

/// What a member is.
pub(crate) enum MemberKind {
    /// A file.
    File,
    /// A file whose bytes are not those behind its header, and what it is instead.
    Elsewhere(String),
    /// A folder, a device, a record about the archive.
    Other,
}

/// How an archive ends.
pub(crate) enum Ending {
    /// With an end mark and padding.
    Whole,
    /// Not at all: it does not begin as one.
    NoArchive(String),
    /// Early, or with something behind its end.
    Broken(String),
}

/// Calls `visit` with every whole member in front of the archive's end, or of the first damage.
///
/// # Errors
/// When the file cannot be read. What is wrong with the archive is no error.
pub(crate) fn walk(file: &File, mut visit: impl FnMut(TarMember)) -> io::Result<Ending> {
    let (bytes, at, mut start) = (file.metadata()?.len(), Cell::new(0), 0);
    let mut archive = tar::Archive::new(Headers { file, at: &at, read: 0 });
    for entry in archive.entries_with_seek()? {
        let mut entry = match entry {
            Ok(entry) => entry,
            // The system's own errors say nothing of the archive: the next try may succeed.
            Err(error) if error.raw_os_error().is_some() => return Err(error),
            Err(error) if start == 0 && error.kind() != io::ErrorKind::FileTooLarge => {
                return Ok(Ending::NoArchive(one_line(&error.to_string())));
            }
            Err(error) => {
                let reason = one_line(&error.to_string());
                return Ok(Ending::Broken(format!("damaged or cut at byte {start}, what follows is lost: {reason}")));
            }
        };
        let (data, size) = match entry.header().entry_type() {
            // `size` counts the holes, and the list of them may go on in blocks that have just been read.
            EntryType::GNUSparse => (at.get(), entry.header().entry_size()?),
            _ => (entry.raw_file_position(), entry.size()),
        };
        let (path, kind) = path_and_kind(&mut entry)?;
        let end = data.saturating_add(size);
        if end > bytes {
            let name = one_line(&String::from_utf8_lossy(&path));
            let reason = format!("cut at byte {bytes}, inside member {name}; it and what follows are lost");
            return Ok(Ending::Broken(reason));
        }
        visit(TarMember { start, data, end, path, kind });
        start = end.next_multiple_of(BLOCK);
    }
    end_of_archive(file, start, bytes)
}

/// A member's name, and what it is.
fn path_and_kind(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<(Vec<u8>, MemberKind)> {
    let mut path = entry.path_bytes().into_owned();
    let kind = match entry.header().entry_type() {
        EntryType::Link => MemberKind::Elsewhere(format!(
            "a hard link to {}, not a file; pack the shard anew with --hard-dereference",
            target(entry)
        )),
        EntryType::Symlink => MemberKind::Elsewhere(format!(
            "a symbolic link to {}, not a file; pack the shard anew with --dereference",
            target(entry)
        )),
        kind @ (EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) => {
            let mut sparse = kind == EntryType::GNUSparse;
            for record in entry.pax_extensions()?.into_iter().flatten().flatten() {
                sparse |= record.key_bytes().starts_with(b"GNU.sparse.");
                // `path` is a made-up one then.
                if record.key_bytes() == b"GNU.sparse.name" {
                    path = record.value_bytes().to_vec();
                }
            }
            match sparse {
                true => MemberKind::Elsewhere(
                    "a sparse file, whose holes are not read; pack the shard anew without --sparse".to_owned(),
                ),
                false => MemberKind::File,
            }
        }
        _ => MemberKind::Other,
    };
    Ok((path, kind))
}

fn target(link: &tar::Entry<'_, impl Read>) -> String {
    one_line(&String::from_utf8_lossy(&link.link_name_bytes().unwrap_or_default()))
}

/// What stands behind the last member, whose end mark would be at `mark`: one block of zeros is enough, and padding may
/// follow. A reader stops there, so whatever else follows is lost to it.
fn end_of_archive(file: &File, mark: u64, bytes: u64) -> io::Result<Ending> {
    if mark >= bytes {
        let reason = "has no end-of-archive mark: it may have been cut between two members";
        return Ok(Ending::Broken(reason.to_owned()));
    }
    let reach = bytes.min(mark + MAX_PADDING);
    let (mut buffer, mut at) = (vec![0; 1 << 16], mark);
    while at < reach {
        let part = &mut buffer[..(reach - at).min(1 << 16) as usize];
        file.read_exact_at(part, at)?;
        if let Some(place) = part.iter().position(|&byte| byte != 0) {
            return Ok(Ending::Broken(format!(
                "ends at byte {mark}, but other data follows at byte {}, which is lost: a block was wiped out, or archives were joined with cat",
                at + place as u64
            )));
        }
        at += part.len() as u64;
    }
    match bytes - mark > MAX_PADDING {
        true => Ok(Ending::Broken(format!(
            "ends at byte {mark} of {bytes}, and what follows is no padding: a hole, or a copy that was not finished"
        ))),
        false => Ok(Ending::Whole),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A file of which only headers are read: what the archive reads between two jumps is one member's.
struct Headers<'a> {
    file: &'a File,
    at: &'a Cell<u64>,
    /// Bytes since the last jump.
    read: u64,
}

impl Read for Headers<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.read == MAX_HEADER_BYTES {
            let reason = format!("a member's headers are longer than {MAX_HEADER_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
        }
        let length = into.len().min((MAX_HEADER_BYTES - self.read) as usize);
        let read = self.file.read_at(&mut into[..length], self.at.get())? as u64;
        self.at.set(self.at.get() + read);
        self.read += read;
        Ok(read as usize)
    }
}

impl Seek for Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.get().checked_add_signed(by),
            SeekFrom::End(_) => None,
        };
        let at = at.ok_or_else(|| io::Error::other("a member reaches beyond any file"))?;
        self.at.set(at);
        self.read = 0;
        Ok(at)
    }
}
