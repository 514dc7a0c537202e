//! Reading a pickle's bytes: every length is checked against what is there before anything is copied.

use super::problem::TorchFileProblem;

/// Longest name of a module or attribute.
const MAX_LINE: usize = 1000;

/// A position in the bytes of a pickle.
pub(super) struct PickleReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> PickleReader<'a> {
    pub fn new(bytes: &'a [u8]) -> PickleReader<'a> {
        PickleReader { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    pub fn take(&mut self, length: u64) -> Result<&'a [u8], TorchFileProblem> {
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| TorchFileProblem::Truncated { part: "its pickle".into() })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TorchFileProblem> {
        let taken = self.take(N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    pub fn u8(&mut self) -> Result<u8, TorchFileProblem> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Result<u16, TorchFileProblem> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, TorchFileProblem> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn i32(&mut self) -> Result<i32, TorchFileProblem> {
        self.array().map(i32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, TorchFileProblem> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn f64_big_endian(&mut self) -> Result<f64, TorchFileProblem> {
        self.array().map(f64::from_be_bytes)
    }

    /// Text up to a line feed, which is taken too.
    pub fn line(&mut self) -> Result<String, TorchFileProblem> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().take(MAX_LINE).position(|&byte| byte == b'\n');
        let Some(length) = length else {
            return Err(if rest.len() < MAX_LINE {
                TorchFileProblem::Truncated { part: "its pickle".into() }
            } else {
                TorchFileProblem::Pickle { at: self.at, message: "a name without end".into() }
            });
        };
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(line)
    }
}
