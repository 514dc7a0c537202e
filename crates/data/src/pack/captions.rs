//! Captions files: `.jsonl`, `.csv`, `.tsv`, and `.json` with a list of objects. All but the last are read row by row.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::lines::{Lines, utf8};
use super::row::{Content, ImageSource, Place, Row, RowData, captions};
use super::source::{Input, RowIter, Source, file_input, file_name};
use super::table::{Columns, CsvRow, CsvRows};
use super::{CAPTION_FIELD, IMAGE_FIELD, Keep, Reading};
use crate::DataError;

/// One captions file or several, one behind the other.
pub(crate) struct CaptionFiles {
    files: Vec<CaptionFile>,
}

struct CaptionFile {
    path: PathBuf,
    images: PathBuf,
    kind: Kind,
    /// Rows that are there, a header not among them.
    rows: u64,
    /// Lines of the files in front.
    lines_before: u64,
    reading: Reading,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Jsonl,
    Csv,
    Tsv,
    List,
}

impl Kind {
    fn of(path: &Path) -> Option<Kind> {
        match path.extension()?.to_str()? {
            "jsonl" | "ndjson" => Some(Kind::Jsonl),
            "csv" => Some(Kind::Csv),
            "tsv" => Some(Kind::Tsv),
            "json" => Some(Kind::List),
            _ => None,
        }
    }
}

/// Whether a file's name is that of a captions file whose rows are lines.
pub(crate) fn is_captions_file(path: &Path) -> bool {
    matches!(Kind::of(path), Some(Kind::Jsonl | Kind::Csv | Kind::Tsv))
}

impl CaptionFiles {
    /// Reads every file once, to know how many rows there are and that each can be told from the next.
    pub(crate) fn open(paths: Vec<PathBuf>, reading: &Reading) -> Result<CaptionFiles, DataError> {
        let (mut files, mut lines_before) = (Vec::new(), 0);
        for path in paths {
            let kind = Kind::of(&path).ok_or_else(|| DataError::Source {
                path: path.clone(),
                reason: "the name of a captions file must end in .jsonl, .csv, .tsv or .json".to_owned(),
            })?;
            let images = reading.images_beside(&path);
            let mut file = CaptionFile { path, images, kind, rows: 0, lines_before, reading: reading.clone() };
            let mut records = file.records()?;
            for record in records.by_ref() {
                record.map_err(|error| file.refuse(error))?;
                file.rows += 1;
            }
            lines_before += records.passed().unwrap_or(file.rows);
            if file.rows == 0 {
                return Err(file.refuse(io::Error::other("it holds no row")));
            }
            files.push(file);
        }
        Ok(CaptionFiles { files })
    }
}

impl Source for CaptionFiles {
    fn inputs(&self) -> Result<Vec<Input>, DataError> {
        self.files.iter().map(|file| file_input(&file.path)).collect()
    }

    fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let mut skip = from;
        Box::new(self.files.iter().flat_map(move |file| {
            let skipped = skip.min(file.rows);
            skip -= skipped;
            file.read(skipped)
        }))
    }
}

/// A row before it is understood.
enum Record {
    Text(Vec<u8>),
    Fields(CsvRow),
    Object(Value),
}

enum Records {
    Lines(Lines),
    Csv(Box<CsvRows>),
    List(std::iter::Enumerate<std::vec::IntoIter<Value>>),
}

impl Records {
    /// Lines that have passed, of what has lines.
    fn passed(&self) -> Option<u64> {
        match self {
            Records::Lines(lines) => Some(lines.passed()),
            Records::Csv(rows) => Some(rows.passed()),
            Records::List(_) => None,
        }
    }
}

impl Iterator for Records {
    type Item = io::Result<(u64, Record)>;

    fn next(&mut self) -> Option<io::Result<(u64, Record)>> {
        match self {
            Records::Lines(lines) => Some(lines.next()?.map(|line| (line.number, Record::Text(line.bytes)))),
            Records::Csv(rows) => Some(rows.next()?.map(|(line, fields)| (line, Record::Fields(fields)))),
            Records::List(list) => list.next().map(|(at, object)| Ok((at as u64 + 1, Record::Object(object)))),
        }
    }
}

impl CaptionFile {
    fn refuse(&self, error: io::Error) -> DataError {
        match error.kind() {
            io::ErrorKind::Other => DataError::Source { path: self.path.clone(), reason: error.to_string() },
            _ => DataError::Io { path: self.path.clone(), source: error },
        }
    }

    fn open_records(&self) -> io::Result<Records> {
        Ok(match self.kind {
            Kind::Jsonl | Kind::Tsv => Records::Lines(Lines::open(&self.path)?),
            Kind::Csv => Records::Csv(Box::new(CsvRows::open(&self.path)?)),
            Kind::List => {
                let file = BufReader::new(File::open(&self.path)?);
                let list: Vec<Value> = serde_json::from_reader(file)
                    .map_err(|error| io::Error::other(format!("no list of objects in JSON: {error}")))?;
                Records::List(list.into_iter().enumerate())
            }
        })
    }

    /// The file's columns, and whether its first row names them.
    fn columns(&self) -> Result<Option<(Columns, bool)>, DataError> {
        let split = |record: Record| match record {
            Record::Text(text) => split_tabs(&text).map(|field| String::from_utf8_lossy(field).into_owned()).collect(),
            Record::Fields(Ok(fields)) => {
                fields.iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect()
            }
            Record::Fields(Err(reason)) => vec![reason],
            Record::Object(_) => Vec::new(),
        };
        if matches!(self.kind, Kind::Jsonl | Kind::List) {
            return Ok(None);
        }
        let first = self.open_records().and_then(|mut records| records.next().transpose());
        let first = first.map_err(|error| self.refuse(error))?;
        let first: Vec<String> = first.map(|(_, record)| split(record)).unwrap_or_default();
        match first.is_empty() {
            true => Err(self.refuse(io::Error::other("it holds no row"))),
            false => Columns::of(&self.path, &first, &self.reading, self.kind == Kind::Csv).map(Some),
        }
    }

    /// Its rows, a header left out.
    fn records(&self) -> Result<Records, DataError> {
        let header = self.columns()?.is_some_and(|(_, header)| header);
        let mut records = self.open_records().map_err(|error| self.refuse(error))?;
        if header {
            records.next();
        }
        Ok(records)
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let opened = self.columns().and_then(|columns| Ok((columns, self.records()?)));
        let (columns, records) = match opened {
            Ok(opened) => opened,
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        let columns = columns.map(|(columns, _)| columns);
        let name = file_name(&self.path);
        let rows = records.skip(usize::try_from(from).unwrap_or(usize::MAX));
        Box::new(rows.map(move |record| {
            let (line, record) = record.map_err(|error| self.refuse(error))?;
            let data = self.content(record, columns.as_ref()).map(RowData::Content);
            Ok(Row { number: self.lines_before + line, place: self.place(&name, line), data })
        }))
    }

    fn place(&self, name: &Arc<str>, line: u64) -> Place {
        let file = Arc::clone(name);
        match self.kind {
            Kind::List => Place::Numbered { file, what: "entry", number: line },
            _ => Place::Line { file, line },
        }
    }

    fn content(&self, record: Record, columns: Option<&Columns>) -> Result<Content, String> {
        let object = match (record, columns) {
            (Record::Text(text), Some(columns)) => {
                utf8(&text)?;
                return columns.content(&split_tabs(&text).collect::<Vec<_>>(), &self.images);
            }
            (Record::Fields(fields), Some(columns)) => {
                return columns.content(&fields?.iter().collect::<Vec<_>>(), &self.images);
            }
            (Record::Text(text), None) => {
                serde_json::from_str(utf8(&text)?).map_err(|error| format!("not valid JSON: {error}"))?
            }
            (Record::Fields(_), None) => Value::Null,
            (Record::Object(object), _) => object,
        };
        of_object(object, &self.reading, &self.images)
    }
}

fn split_tabs(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&byte| byte == b'\t')
}

/// What an object says under the two names, and what it has besides.
fn of_object(object: Value, reading: &Reading, images: &Path) -> Result<Content, String> {
    let Value::Object(mut object) = object else {
        return Err("not an object in JSON".to_owned());
    };
    let image_name = reading.image_field.as_deref().unwrap_or(IMAGE_FIELD);
    let caption_name = reading.caption_field.as_deref().unwrap_or(CAPTION_FIELD);
    let image = object.get(image_name).and_then(Value::as_str).map(|image| images.join(image));
    let image = image.ok_or_else(|| format!("no text field \"{image_name}\""))?;
    let captions =
        object.get(caption_name).and_then(captions).ok_or_else(|| format!("no text field \"{caption_name}\""))?;
    let fields = reading.keep.of(&mut object, &[image_name, caption_name]);
    Ok(Content { image: ImageSource::Files(vec![image]), captions, fields })
}

impl Keep {
    /// The fields of an object that are kept, in the object's order, for named ones in the order of the names.
    pub(crate) fn of(&self, object: &mut Map<String, Value>, taken: &[&str]) -> Map<String, Value> {
        match self {
            Keep::Nothing => Map::new(),
            Keep::All => {
                taken.iter().for_each(|name| {
                    object.shift_remove(*name);
                });
                std::mem::take(object)
            }
            Keep::Fields(names) => {
                names.iter().filter_map(|name| Some((name.clone(), object.get(name)?.clone()))).collect()
            }
        }
    }
}
