//! A file's length and digest, found while it is written.

use std::io::{self, Write};

use crate::Digest;

/// Counts and digests what passes through to `out`.
pub struct DigestWriter<W> {
    out: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> DigestWriter<W> {
    /// Nothing has passed yet.
    pub fn new(out: W) -> DigestWriter<W> {
        DigestWriter { out, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// What is behind it; how many bytes have passed, and their digest.
    pub fn finish(self) -> (W, u64, Digest) {
        (self.out, self.bytes, Digest::finish(&self.hasher))
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.out.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
