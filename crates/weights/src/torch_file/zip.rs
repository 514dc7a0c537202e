//! The zip archive around a PyTorch file: a directory of stored entries, each checked to lie where it says.
//!
//! `torch.save` stores its entries uncompressed, so an entry is a range of bytes of the file and nothing is ever unpacked. Checksums are
//! not compared, as PyTorch's own reader does not either.

use std::collections::BTreeMap;
use std::ops::Range;

use super::problem::TorchFileProblem;

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END_BYTES: usize = 22;
const CENTRAL_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;
/// A 32-bit field with this value refers to its 64-bit counterpart.
const IN_ZIP64: u64 = 0xffff_ffff;

/// Each entry's bytes, as a range of the file.
pub(super) type Entries = BTreeMap<String, Range<usize>>;

/// Whether the bytes begin like a zip archive.
pub(super) fn is_zip(file: &[u8]) -> bool {
    file.starts_with(LOCAL) || file.starts_with(END)
}

/// Walks the archive's directory.
pub(super) fn entries(file: &[u8]) -> Result<Entries, TorchFileProblem> {
    let directory = find_directory(file)?;
    let mut entries = Entries::new();
    let mut occupied: Vec<(Range<usize>, String)> = Vec::new();
    let mut at = directory.bytes.start;
    for _ in 0..directory.entries {
        let entry = Central::read(file, at, directory.bytes.end)?;
        at = entry.end;
        let data = entry.locate(file, directory.bytes.start)?;
        occupied.push((entry.offset..data.end, entry.name.clone()));
        if entries.insert(entry.name.clone(), data).is_some() {
            return Err(damaged(format!("it has two entries {:?}", entry.name)));
        }
    }
    // Two entries in the same bytes are how a small archive claims to hold a large one.
    occupied.sort_by_key(|(range, _)| range.start);
    if let Some(pair) = occupied.windows(2).find(|pair| pair[1].0.start < pair[0].0.end) {
        return Err(damaged(format!("its entries {:?} and {:?} overlap", pair[0].1, pair[1].1)));
    }
    Ok(entries)
}

struct Directory {
    bytes: Range<usize>,
    entries: u64,
}

fn find_directory(file: &[u8]) -> Result<Directory, TorchFileProblem> {
    let truncated = || TorchFileProblem::Truncated { part: "its zip directory".into() };
    // The end record is the last thing in the file but for a comment.
    let first = file.len().saturating_sub(END_BYTES + usize::from(u16::MAX));
    let fits = |at: usize| file[at..].starts_with(END) && at + END_BYTES + u16_at(file, at + 20) as usize == file.len();
    let last = file.len().checked_sub(END_BYTES).ok_or_else(truncated)?;
    let end = (first..=last).rev().find(|&at| fits(at)).ok_or_else(truncated)?;
    let (mut entries, mut size, mut offset) = (u16_at(file, end + 10), u32_at(file, end + 12), u32_at(file, end + 16));
    let mut limit = end;
    let locator = end.checked_sub(20).filter(|&at| file[at..].starts_with(END64_LOCATOR));
    if let Some(locator) = locator {
        let at = usize::try_from(u64_at(file, locator + 8)).ok().filter(|at| *at <= locator.saturating_sub(56));
        let at = at.filter(|&at| file[at..].starts_with(END64));
        limit = at.ok_or_else(|| damaged("its zip64 end record is not where its locator says".into()))?;
        (entries, size, offset) = (u64_at(file, limit + 32), u64_at(file, limit + 40), u64_at(file, limit + 48));
    }
    let start = usize::try_from(offset).ok();
    let stop = start.and_then(|start| start.checked_add(usize::try_from(size).ok()?)).filter(|stop| *stop <= limit);
    let (Some(start), Some(stop)) = (start, stop) else {
        return Err(damaged("its directory does not lie inside the file".into()));
    };
    if entries > ((stop - start) / CENTRAL_BYTES) as u64 {
        return Err(damaged(format!("its directory of {} bytes cannot hold {entries} entries", stop - start)));
    }
    Ok(Directory { bytes: start..stop, entries })
}

/// One entry of the directory.
struct Central {
    name: String,
    /// Of its local header.
    offset: usize,
    size: usize,
    /// Where the next one begins.
    end: usize,
}

impl Central {
    fn read(file: &[u8], at: usize, limit: usize) -> Result<Central, TorchFileProblem> {
        let record = file[at..limit].get(..CENTRAL_BYTES).filter(|record| record.starts_with(CENTRAL));
        let record = record.ok_or_else(|| damaged(format!("no directory entry at byte {at}")))?;
        let lengths = [28, 30, 32].map(|field| u16_at(record, field) as usize);
        let name_end = at + CENTRAL_BYTES + lengths[0];
        let extra_end = name_end + lengths[1];
        let end = extra_end + lengths[2];
        if end > limit {
            return Err(damaged(format!("the directory entry at byte {at} is longer than the directory")));
        }
        let name = String::from_utf8_lossy(&file[at + CENTRAL_BYTES..name_end]).into_owned();
        let (flags, method) = (u16_at(record, 8), u16_at(record, 10) as u16);
        // Bit 0: encrypted; bit 6: strongly; bit 13: the directory too.
        if flags & (1 | 1 << 6 | 1 << 13) != 0 {
            return Err(TorchFileProblem::Encrypted { entry: name });
        }
        if method != 0 {
            return Err(TorchFileProblem::Compressed { entry: name, method });
        }
        let (mut packed, mut size, mut offset) = (u32_at(record, 20), u32_at(record, 24), u32_at(record, 42));
        let mut wide = Zip64Fields::find(&file[name_end..extra_end]);
        for field in [&mut size, &mut packed, &mut offset] {
            if *field == IN_ZIP64 {
                *field = wide.next().ok_or_else(|| damaged(format!("entry {name:?} lacks its 64-bit sizes")))?;
            }
        }
        if packed != size {
            return Err(damaged(format!("entry {name:?} is stored, yet takes {packed} bytes for {size}")));
        }
        let narrow = |value: u64| usize::try_from(value).ok();
        let (Some(size), Some(offset)) = (narrow(size), narrow(offset)) else {
            return Err(damaged(format!("entry {name:?} lies outside the file")));
        };
        Ok(Central { name, offset, size, end })
    }

    /// The entry's bytes, behind its local header and before the directory.
    fn locate(&self, file: &[u8], limit: usize) -> Result<Range<usize>, TorchFileProblem> {
        let name = &self.name;
        let header = self.offset.checked_add(LOCAL_BYTES).and_then(|end| file[..limit].get(self.offset..end));
        let header = header.filter(|header| header.starts_with(LOCAL));
        let header = header.ok_or_else(|| damaged(format!("entry {name:?} has no header where the directory says")))?;
        let name_start = self.offset + LOCAL_BYTES;
        let name_end = name_start + u16_at(header, 26) as usize;
        if file[..limit].get(name_start..name_end) != Some(name.as_bytes()) {
            return Err(damaged(format!("entry {name:?} has another name in its own header")));
        }
        let start = name_end + u16_at(header, 28) as usize;
        match start.checked_add(self.size) {
            Some(end) if end <= limit => Ok(start..end),
            _ => Err(damaged(format!("entry {name:?} of {} bytes reaches beyond the archive's data", self.size))),
        }
    }
}

/// The 64-bit values of an entry's extra field, in their fixed order.
struct Zip64Fields<'a>(&'a [u8]);

impl<'a> Zip64Fields<'a> {
    fn find(mut extra: &'a [u8]) -> Zip64Fields<'a> {
        while extra.len() >= 4 {
            let (id, length) = (u16_at(extra, 0), u16_at(extra, 2) as usize);
            let Some(field) = extra.get(4..4 + length) else { break };
            if id == 1 {
                return Zip64Fields(field);
            }
            extra = &extra[4 + length..];
        }
        Zip64Fields(&[])
    }

    fn next(&mut self) -> Option<u64> {
        let (value, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*value))
    }
}

fn damaged(message: String) -> TorchFileProblem {
    TorchFileProblem::Archive { message }
}

// The callers have checked that the bytes are there.

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) | u32_at(bytes, at + 4) << 32
}
