//! Rows of a table: comma-separated with quotes, or tab-separated without.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use csv::{ByteRecord, Position, ReaderBuilder, Terminator};
use serde_json::{Map, Value};

use super::lines::{MAX_ROW_BYTES, listed, too_long, utf8};
use super::row::{Content, ImageSource};
use super::{CAPTION_FIELD, IMAGE_FIELD, Keep, Reading};
use crate::DataError;

/// Which columns of a table count.
pub(crate) struct Columns {
    /// Columns of a row, where a header says so.
    count: Option<usize>,
    image: usize,
    caption: usize,
    keep: Vec<(String, usize)>,
}

impl Columns {
    /// A first row that holds both names is a header. Without one, of a table that need not have it, the first two
    /// columns count.
    pub(crate) fn of(
        path: &Path,
        first: &[String],
        reading: &Reading,
        needs_header: bool,
    ) -> Result<(Self, bool), DataError> {
        let refuse = |reason: String| DataError::Source { path: path.to_owned(), reason };
        let column = |name: &str| first.iter().position(|column| column == name);
        let image_name = reading.image_field.as_deref().unwrap_or(IMAGE_FIELD);
        let caption_name = reading.caption_field.as_deref().unwrap_or(CAPTION_FIELD);
        let (image, caption) = match (column(image_name), column(caption_name)) {
            (Some(image), Some(caption)) => (image, caption),
            _ if !needs_header && !reading.names_a_field() && reading.keep == Keep::Nothing => {
                return Ok((Columns { count: None, image: 0, caption: 1, keep: Vec::new() }, false));
            }
            (image, _) => {
                let missing = if image.is_none() { image_name } else { caption_name };
                let columns = listed(first.iter().map(String::as_str));
                return Err(refuse(format!("its first line names no column \"{missing}\" (it has: {columns})")));
            }
        };
        let others = first.iter().cloned().enumerate().map(|(at, name)| (name, at));
        let keep = match &reading.keep {
            Keep::Nothing => Vec::new(),
            Keep::All => others.filter(|&(_, at)| at != image && at != caption).collect(),
            Keep::Fields(names) => names
                .iter()
                .map(|name| column(name).map(|at| (name.clone(), at)).ok_or(name))
                .collect::<Result<_, _>>()
                .map_err(|name| {
                    let columns = listed(first.iter().map(String::as_str));
                    refuse(format!("it has no column \"{name}\" to keep (it has: {columns})"))
                })?,
        };
        Ok((Columns { count: Some(first.len()), image, caption, keep }, true))
    }

    /// What the fields of a row say.
    pub(crate) fn content(&self, fields: &[&[u8]], images: &Path) -> Result<Content, String> {
        let needed = self.count.unwrap_or(self.image.max(self.caption) + 1);
        if self.count.is_some_and(|count| fields.len() != count) || fields.len() < needed {
            return Err(format!("{} columns where {needed} are needed", fields.len()));
        }
        let text = |at: usize| match utf8(fields[at]) {
            Ok(text) => Ok(text.to_owned()),
            Err(reason) => Err(format!("column {}: {reason}", at + 1)),
        };
        let mut kept = Map::new();
        for (name, at) in &self.keep {
            kept.insert(name.clone(), Value::String(text(*at)?));
        }
        let image = ImageSource::Files(vec![images.join(PathBuf::from(text(self.image)?))]);
        Ok(Content { image, captions: vec![text(self.caption)?], fields: kept })
    }
}

/// The rows of a comma-separated file, each with the line that it begins in.
pub(crate) struct CsvRows {
    reader: csv::Reader<Bounded>,
    done: bool,
}

impl CsvRows {
    pub(crate) fn open(path: &Path) -> io::Result<CsvRows> {
        let quotes = Quotes { state: QuoteState::FieldStart, at: 0, broken: VecDeque::new() };
        let bounded = Bounded { file: File::open(path)?, left: MAX_ROW_BYTES, end: END, quotes };
        // With its own CRLF the parser counts a row that ends so as one line further up.
        let mut builder = ReaderBuilder::new();
        builder.has_headers(false).flexible(true).terminator(Terminator::Any(b'\n'));
        Ok(CsvRows { reader: builder.from_reader(bounded), done: false })
    }

    /// Lines that have passed.
    pub(crate) fn passed(&self) -> u64 {
        self.reader.position().line().saturating_sub(1)
    }

    fn next_row(&mut self) -> io::Result<Option<(u64, CsvRow)>> {
        let begin: Position = self.reader.position().clone();
        self.reader.get_mut().left = MAX_ROW_BYTES;
        let mut record = ByteRecord::new();
        let read = self.reader.read_byte_record(&mut record);
        let line = record.position().map_or(begin.line(), Position::line);
        // A reader that hands out nothing more has met its bound.
        match read {
            Err(error) if self.reader.get_ref().left == 0 => {
                let cause = too_long(line);
                Err(io::Error::other(format!("{cause}; is a quote missing there? ({error})")))
            }
            Err(error) => Err(io::Error::other(error)),
            Ok(false) => Err(io::Error::other("it ends in the middle of a row")),
            Ok(true) if record.len() == 1 && &record[0] == END_FIELD => Ok(None),
            Ok(true) if record.iter().any(|field| field.ends_with(END)) => {
                Err(io::Error::other(format!("the row that begins in line {line} opens a quote that is never closed")))
            }
            Ok(true) => {
                let end = self.reader.position().byte();
                let row =
                    match self.reader.get_mut().quotes.is_broken_before(end) {
                        false => Ok(without_carriage_return(record)),
                        true => Err("a closing quote stands in the middle of a field; is one missing in front of it?"
                            .to_owned()),
                    };
                Ok(Some((line, row)))
            }
        }
    }
}

/// The fields of a row, or why they cannot be told apart.
pub(crate) type CsvRow = Result<ByteRecord, String>;

impl Iterator for CsvRows {
    type Item = io::Result<(u64, CsvRow)>;

    fn next(&mut self) -> Option<io::Result<(u64, CsvRow)>> {
        if self.done {
            return None;
        }
        loop {
            let next = self.next_row().transpose();
            match &next {
                Some(Ok((_, Ok(record)))) if record.len() == 1 && record[0].is_empty() => continue,
                Some(Ok(_)) => {}
                _ => self.done = true,
            }
            return next;
        }
    }
}

/// The record without the first half of a CRLF behind it.
fn without_carriage_return(record: ByteRecord) -> ByteRecord {
    match record.iter().next_back().and_then(|last| last.strip_suffix(b"\r")) {
        None => record,
        Some(last) => record.iter().take(record.len() - 1).chain([last]).collect(),
    }
}

/// Stands behind the end of the file as a row of its own: inside another row it shows that a quote was left open,
/// which the parser takes for a field that reaches to the end.
const END: &[u8] = b"\n\0end of the table\0\n";
const END_FIELD: &[u8] = b"\0end of the table\0";

/// A file with a mark behind its end, of which a single row may take no more than a certain length.
struct Bounded {
    file: File,
    left: u64,
    end: &'static [u8],
    quotes: Quotes,
}

/// Looks for what the parser passes over: text behind a closing quote. A quote that is missing makes it, where the next
/// one closes what was left open, and the rows in between would become one.
struct Quotes {
    state: QuoteState,
    /// Bytes that have been looked at.
    at: u64,
    /// Where such text begins, in what the parser has not handed out yet.
    broken: VecDeque<u64>,
}

#[derive(Clone, Copy)]
enum QuoteState {
    FieldStart,
    Plain,
    Quoted,
    /// Behind a quote inside quotes: the end, or the first of two that stand for one.
    MaybeClosed,
    /// Behind a carriage return behind the end.
    Return,
}

impl Quotes {
    fn look_at(&mut self, bytes: &[u8]) {
        use QuoteState::{FieldStart, MaybeClosed, Plain, Quoted, Return};
        for &byte in bytes {
            self.state = match (self.state, byte) {
                // A byte order mark stands in front of the first field.
                (FieldStart, 0xEF | 0xBB | 0xBF) if self.at < 3 => FieldStart,
                (Quoted, b'"') => MaybeClosed,
                (Quoted, _) | (FieldStart | MaybeClosed, b'"') => Quoted,
                (_, b'\n') | (FieldStart | Plain | MaybeClosed, b',') => FieldStart,
                (FieldStart | Plain, _) => Plain,
                (MaybeClosed, b'\r') => Return,
                (MaybeClosed | Return, _) => {
                    self.broken.push_back(self.at);
                    Plain
                }
            };
            self.at += 1;
        }
    }

    /// Whether such text lies in front of byte `end`; what does is forgotten.
    fn is_broken_before(&mut self, end: u64) -> bool {
        let found = self.broken.partition_point(|&at| at < end);
        self.broken.drain(..found).count() > 0
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other("too long"));
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let mut read = self.file.read(&mut buffer[..most])?;
        self.quotes.look_at(&buffer[..read]);
        if read == 0 {
            read = self.end.read(&mut buffer[..most])?;
        }
        self.left -= read as u64;
        Ok(read)
    }
}
