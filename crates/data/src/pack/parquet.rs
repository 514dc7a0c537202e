//! Parquet files with images inside, as Hugging Face's datasets are: a struct of `bytes` and `path`, or plain bytes.
//! Columns that are not asked for are not read, and of those that are a few rows at a time.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::basic::{ConvertedType, Repetition, Type as Physical};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::{ReaderIter, TreeBuilder};
use ::parquet::record::{Field, Row as Record};
use ::parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};
use serde_json::{Map, Number, Value};

use super::parquet_nesting::nesting;
use super::row::{Content, ImageSource, Place, Row, RowData, Unusable};
use super::source::{Input, RowIter, Source, file_input, file_name};
use super::{CAPTION_FIELD, IMAGE_FIELD, Keep, Reading};
use crate::DataError;
use crate::loader::sample::caught;
use crate::pack::lines::{listed, utf8};

/// Rows of a column that are held at once.
const ROWS_AT_ONCE: usize = 16;
/// Levels of a schema: the reader walks it recursively, and a thread's stack ends.
const MOST_LEVELS: usize = 100;

/// The files, one behind the other.
pub(crate) struct ParquetFiles {
    files: Vec<ParquetFile>,
}

struct ParquetFile {
    path: PathBuf,
    images: PathBuf,
    reader: SerializedFileReader<File>,
    /// The columns that are read: image, caption, those to keep.
    columns: SchemaDescPtr,
    /// Rows of each row group.
    groups: Vec<u64>,
    rows_before: u64,
}

impl ParquetFiles {
    pub(crate) fn open(paths: Vec<PathBuf>, reading: &Reading) -> Result<ParquetFiles, DataError> {
        let (mut files, mut rows_before) = (Vec::new(), 0);
        for path in paths {
            let file = ParquetFile::open(path, reading, rows_before)?;
            rows_before += file.rows();
            files.push(file);
        }
        match files.first() {
            Some(first) if rows_before == 0 => Err(first.refuse("it holds no row".to_owned())),
            _ => Ok(ParquetFiles { files }),
        }
    }
}

impl Source for ParquetFiles {
    fn inputs(&self) -> Result<Vec<Input>, DataError> {
        self.files.iter().map(|file| file_input(&file.path)).collect()
    }

    fn rows(&self) -> u64 {
        self.files.iter().map(ParquetFile::rows).sum()
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let left = self.files.iter().filter(move |file| file.rows_before + file.rows() > from);
        Box::new(left.flat_map(move |file| file.read(from.saturating_sub(file.rows_before))))
    }
}

impl ParquetFile {
    fn open(path: PathBuf, reading: &Reading, rows_before: u64) -> Result<ParquetFile, DataError> {
        let refuse = |reason: String| DataError::Source { path: path.clone(), reason };
        let mut file = File::open(&path).map_err(DataError::io(&path))?;
        let levels = nesting(&mut file).map_err(DataError::io(&path))?;
        if levels > MOST_LEVELS {
            return Err(refuse(format!("its schema nests {levels} levels deep, more than {MOST_LEVELS}")));
        }
        let opened = unpanicked(&path, || Ok(SerializedFileReader::new(file)?));
        let reader = opened.map_err(|error| match error {
            Unusable::Row(reason) => refuse(format!("no whole Parquet file: {reason}")),
            Unusable::Machine(error) => error,
        })?;
        let groups: Option<Vec<u64>> =
            reader.metadata().row_groups().iter().map(|group| u64::try_from(group.num_rows()).ok()).collect();
        let groups = groups.ok_or_else(|| refuse("a row group claims a negative number of rows".to_owned()))?;
        // Every row has at least a byte of an image, or the file is not what it claims.
        let bytes = fs::metadata(&path).map_err(DataError::io(&path))?.len();
        if groups.iter().try_fold(0u64, |sum, rows| sum.checked_add(*rows)).is_none_or(|rows| rows > bytes) {
            return Err(refuse(format!("it claims more rows than its {bytes} bytes can hold")));
        }
        let columns = columns(reader.metadata().file_metadata().schema(), reading).map_err(refuse)?;
        let images = reading.images_beside(&path);
        Ok(ParquetFile { images, reader, columns, groups, rows_before, path })
    }

    fn refuse(&self, reason: String) -> DataError {
        DataError::Source { path: self.path.clone(), reason }
    }

    fn rows(&self) -> u64 {
        self.groups.iter().sum()
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let name = file_name(&self.path);
        let mut before = 0;
        let starts = self.groups.iter().enumerate().map(move |(group, rows)| {
            before += rows;
            (group, before - rows, *rows)
        });
        let left = starts.filter(move |(_, start, rows)| start + rows > from);
        Box::new(left.flat_map(move |(group, start, rows)| {
            let mut records = self.records(group);
            let name = name.clone();
            let rows = (start + 1..=start + rows).map(move |number| {
                let data = match records.next() {
                    Ok(record) => self.content(record, number).map(RowData::Content),
                    Err(Unusable::Row(reason)) => Err(reason),
                    Err(Unusable::Machine(error)) => return Err(error),
                };
                let place = Place::Numbered { file: name.clone(), what: "row", number };
                Ok(Row { number: self.rows_before + number, place, data })
            });
            rows.skip(from.saturating_sub(start) as usize)
        }))
    }

    fn records(&self, group: usize) -> Records<'_> {
        let opened = unpanicked(&self.path, || {
            let reader = self.reader.get_row_group(group)?;
            let builder = TreeBuilder::new().with_batch_size(ROWS_AT_ONCE);
            Ok(builder.as_iter(self.columns.clone(), &*reader)?)
        });
        Records { path: &self.path, group, state: opened }
    }

    /// The columns of a row stand in the order of [`columns`].
    fn content(&self, record: Record, number: u64) -> Result<Content, String> {
        let mut fields = record.into_columns().into_iter();
        let (Some((_, image)), Some((_, caption))) = (fields.next(), fields.next()) else {
            return Err("it has no columns".to_owned());
        };
        let image = self.image(image, number)?;
        let captions = texts(caption)?;
        let mut kept = Map::new();
        for (name, field) in fields {
            if let Some(value) = scalar(&name, field)? {
                kept.insert(name, value);
            }
        }
        Ok(Content { image, captions, fields: kept })
    }

    fn image(&self, field: Field, number: u64) -> Result<ImageSource, String> {
        let (mut bytes, mut path) = (None, None);
        match field {
            Field::Bytes(data) => bytes = Some(data),
            Field::Group(group) => {
                for (name, field) in group.into_columns() {
                    match (name.as_str(), field) {
                        ("bytes", Field::Bytes(data)) => bytes = Some(data),
                        ("path", Field::Str(text)) => path = Some(text),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        match (bytes, path) {
            (Some(bytes), path) => {
                let name = path.unwrap_or_else(|| format!("image of row {number}"));
                Ok(ImageSource::Bytes { name, bytes: bytes.data().to_vec() })
            }
            (None, Some(path)) => Ok(ImageSource::Files(vec![self.images.join(path)])),
            (None, None) => Err("the image is null".to_owned()),
        }
    }
}

/// The records of a row group; behind a damaged place there is none, and each of the lost rows says so.
struct Records<'a> {
    path: &'a Path,
    group: usize,
    state: Result<ReaderIter, Unusable>,
}

impl Records<'_> {
    fn next(&mut self) -> Result<Record, Unusable> {
        let lost = Err(Unusable::Row("it was given up".to_owned()));
        let next = match std::mem::replace(&mut self.state, lost) {
            Err(error) => Err(error),
            Ok(mut records) => unpanicked(self.path, || match records.next() {
                Some(record) => Ok((record?, records)),
                None => Err(Lost::Damaged("it ends too early".to_owned())),
            }),
        };
        match next {
            Ok((record, records)) => {
                self.state = Ok(records);
                Ok(record)
            }
            Err(Unusable::Row(reason)) => {
                let damaged = format!("row group {} is damaged: {reason}", self.group);
                self.state = Err(Unusable::Row(reason));
                Err(damaged.into())
            }
            Err(error) => Err(error),
        }
    }
}

/// Why the file cannot be read on.
enum Lost {
    Damaged(String),
    Parquet(ParquetError),
}

impl From<ParquetError> for Lost {
    fn from(error: ParquetError) -> Lost {
        Lost::Parquet(error)
    }
}

/// Runs what reads the file: the reader panics on some damaged ones. What the operating system says is no damage.
fn unpanicked<T>(path: &Path, job: impl FnOnce() -> Result<T, Lost>) -> Result<T, Unusable> {
    let panicked = |message| Err(Lost::Damaged(format!("the reader panicked: {message}")));
    let reason = match caught(job).unwrap_or_else(panicked) {
        Ok(result) => return Ok(result),
        Err(Lost::Damaged(reason)) => reason,
        Err(Lost::Parquet(ParquetError::External(error))) => match error.downcast::<io::Error>() {
            Ok(error) if error.raw_os_error().is_some() => {
                return Err(Unusable::Machine(DataError::io(path)(*error)));
            }
            Ok(error) => ParquetError::External(error).to_string(),
            Err(error) => ParquetError::External(error).to_string(),
        },
        Err(Lost::Parquet(error)) => error.to_string(),
    };
    Err(Unusable::Row(reason.split_whitespace().collect::<Vec<_>>().join(" ")))
}

/// Image and caption, and what is kept besides, checked for what they are.
fn columns(schema: &Type, reading: &Reading) -> Result<SchemaDescPtr, String> {
    let fields = schema.get_fields();
    let find = |name: &str| {
        let found = fields.iter().find(|field| field.name() == name);
        let columns = || listed(fields.iter().map(|field| field.name()));
        found.cloned().ok_or_else(|| format!("it has no column \"{name}\" (it has: {})", columns()))
    };
    let image_name = reading.image_field.as_deref().unwrap_or(IMAGE_FIELD);
    let image = find(image_name)?;
    let has_bytes = |field: &Type| match field.is_group() {
        true => field.get_fields().iter().any(|inner| inner.name() == "bytes" && is_binary(inner)),
        false => is_binary(field),
    };
    if !has_bytes(&image) {
        return Err(format!("column \"{image_name}\" is neither bytes nor a struct with bytes"));
    }
    let caption_name = reading.caption_field.as_deref().unwrap_or(CAPTION_FIELD);
    let caption = find(caption_name)?;
    if leaf(&caption).is_none_or(|leaf| !is_binary(leaf)) {
        return Err(format!("column \"{caption_name}\" is neither text nor a list of texts"));
    }
    let others = fields.iter().filter(|field| field.name() != image_name && field.name() != caption_name);
    let kept: Vec<Arc<Type>> = match &reading.keep {
        Keep::Nothing => Vec::new(),
        Keep::All => others.filter(|field| is_scalar(field)).cloned().collect(),
        Keep::Fields(names) => names
            .iter()
            .map(|name| match find(name)? {
                field if is_scalar(&field) => Ok(field),
                _ => Err(format!("column \"{name}\" is neither a number nor a text, so it cannot be kept")),
            })
            .collect::<Result<_, String>>()?,
    };
    let wanted = [image, caption].into_iter().chain(kept).collect();
    let projection =
        Type::group_type_builder("columns").with_fields(wanted).build().map_err(|error| error.to_string())?;
    Ok(Arc::new(SchemaDescriptor::new(Arc::new(projection))))
}

fn is_binary(field: &Type) -> bool {
    field.is_primitive() && field.get_physical_type() == Physical::BYTE_ARRAY
}

/// A number or a text. Bytes that are no text show only in the rows.
fn is_scalar(field: &Type) -> bool {
    use Physical::{BOOLEAN, BYTE_ARRAY, DOUBLE, FLOAT, INT32, INT64};
    let repeated =
        || field.get_basic_info().has_repetition() && field.get_basic_info().repetition() == Repetition::REPEATED;
    field.is_primitive()
        && !repeated()
        && field.get_basic_info().converted_type() != ConvertedType::DECIMAL
        && matches!(field.get_physical_type(), BOOLEAN | INT32 | INT64 | FLOAT | DOUBLE | BYTE_ARRAY)
}

/// The only primitive column below a field.
fn leaf(field: &Type) -> Option<&Type> {
    match field.is_primitive() {
        true => Some(field),
        false => match field.get_fields() {
            [inner] => leaf(inner),
            _ => None,
        },
    }
}

/// A caption, or all of a list.
fn texts(field: Field) -> Result<Vec<String>, String> {
    match field {
        Field::Null => Err("the caption is null".to_owned()),
        Field::Str(text) => Ok(vec![text]),
        Field::Bytes(bytes) => Ok(vec![utf8(bytes.data()).map(str::to_owned).map_err(|e| format!("caption: {e}"))?]),
        Field::ListInternal(list) => {
            let texts = list.elements().iter().filter(|field| !matches!(field, Field::Null)).cloned().map(texts);
            Ok(texts.collect::<Result<Vec<_>, String>>()?.concat())
        }
        _ => Err("the caption is no text".to_owned()),
    }
}

/// A number or a text in JSON; nothing for null.
fn scalar(name: &str, field: Field) -> Result<Option<Value>, String> {
    let float = |value: f64| Number::from_f64(value).map(Value::Number);
    Ok(match field {
        Field::Bool(value) => Some(value.into()),
        Field::Byte(value) => Some(value.into()),
        Field::Short(value) => Some(value.into()),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => Some(value.into()),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => Some(value.into()),
        Field::UByte(value) => Some(value.into()),
        Field::UShort(value) => Some(value.into()),
        Field::UInt(value) => Some(value.into()),
        Field::ULong(value) => Some(value.into()),
        Field::Float(value) => float(value.into()),
        Field::Double(value) => float(value),
        Field::Str(text) => Some(text.into()),
        Field::Bytes(bytes) => Some(utf8(bytes.data()).map_err(|reason| format!("column {name}: {reason}"))?.into()),
        _ => None,
    })
}
