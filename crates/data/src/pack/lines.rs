//! Lines of a text file of any size, one at a time.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// The longest row that is read: more is no caption but a file of another kind, or a quote that is never closed.
pub(crate) const MAX_ROW_BYTES: u64 = 16 << 20;

/// Names of columns are told up to here.
const MAX_LISTED_BYTES: usize = 400;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// A file's lines that are not blank.
pub(crate) struct Lines {
    file: BufReader<File>,
    line: u64,
}

/// A line without its end.
pub(crate) struct Line {
    /// From 1.
    pub(crate) number: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Lines {
    pub(crate) fn open(path: &Path) -> io::Result<Lines> {
        Ok(Lines { file: BufReader::with_capacity(1 << 16, File::open(path)?), line: 0 })
    }

    /// Lines that have passed, blank ones too.
    pub(crate) fn passed(&self) -> u64 {
        self.line
    }

    fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        let read = (&mut self.file).take(MAX_ROW_BYTES).read_until(b'\n', &mut bytes)?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        match bytes.last() {
            Some(b'\n') => {
                bytes.pop();
            }
            _ if read as u64 == MAX_ROW_BYTES => {
                return Err(too_long(self.line));
            }
            _ => {}
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        if self.line == 1 && bytes.starts_with(BOM) {
            bytes.drain(..BOM.len());
        }
        Ok(Some(bytes))
    }
}

/// What is said of a row that does not end.
pub(crate) fn too_long(line: u64) -> io::Error {
    io::Error::other(format!("the row that begins in line {line} is longer than {} MiB", MAX_ROW_BYTES >> 20))
}

impl Iterator for Lines {
    type Item = io::Result<Line>;

    fn next(&mut self) -> Option<io::Result<Line>> {
        loop {
            match self.next_line().transpose()? {
                Ok(bytes) if bytes.trim_ascii().is_empty() => {}
                Ok(bytes) => return Some(Ok(Line { number: self.line, bytes })),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The names of columns for a message of one line, however many a file has.
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names = names.into_iter().collect::<Vec<_>>().join(", ");
    let mut text = names.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.len() > MAX_LISTED_BYTES {
        text.truncate(text.floor_char_boundary(MAX_LISTED_BYTES));
        text += " ...";
    }
    text
}

/// The text of these bytes.
pub(crate) fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|error| format!("not UTF-8 from byte {} on", error.valid_up_to()))
}
