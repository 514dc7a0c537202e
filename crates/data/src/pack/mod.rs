//! From what people have to tar shards with their indices.
//!
//! ```text
//! source      which files, of which format        captions (table, lines), pairs, coco, visual_genome, parquet
//! Row         a picture with what is said of it   read one by one, in the source's order
//! prepare     decoded once, shrunk if asked for   many rows side by side, while those before them are written
//! folder      shards, with what ledger and left_out know of them   one after the other, so that a killed packing goes on
//! ```
//!
//! The same rows give the same bytes, whatever the threads: members carry no time and no owner, and a sample's key is the
//! number of its row (of its line, in a captions file with lines), which leads back from any later complaint to the row.

mod captions;
mod coco;
mod folder;
mod ledger;
mod left_out;
mod lines;
mod pairs;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(feature = "parquet")]
mod parquet_nesting;
mod prepare;
mod row;
mod source;
mod table;
mod visual_genome;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::folder::Folder;
use self::left_out::LeftOutRows;
use self::prepare::{Packable, Prepared, prepare};
use self::row::Row;
pub use self::source::SourceFormat;
use self::source::{RowIter, Source};
use crate::{DataError, Digest, DigestWriter, atomic};

/// Rows that are read and checked side by side, for each thread.
const ROWS_A_THREAD: usize = 16;
/// Rows that were left out and are told of in the report; all of them are in `left_out.jsonl`.
const PROBLEMS_TOLD: usize = 1000;
/// The image's field where none is named.
const IMAGE_FIELD: &str = "image";
/// The caption's field where none is named.
const CAPTION_FIELD: &str = "caption";

/// What is packed, and into what.
#[derive(Clone)]
pub struct PackOptions {
    /// A file, a folder, or a pattern of files as `data.train` takes them.
    pub source: PathBuf,
    /// How it is laid out.
    pub format: SourceFormat,
    /// Which of it is taken.
    pub reading: Reading,
    /// The folder that gets the shards.
    pub out: PathBuf,
    /// Samples a shard.
    pub shard_samples: usize,
    /// How large images become smaller; `None` leaves every image as it is.
    pub reencode: Option<Reencode>,
    /// Called now and then with the number of rows done since the start, and of all that were to do then.
    pub progress: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
}

/// What is taken of a row, and where its image lies.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Where the rows' image paths start; the folder of the file that names them when `None`.
    pub images: Option<PathBuf>,
    /// Field or column that holds the image, by default `image`, in COCO's files `file_name`.
    pub image_field: Option<String>,
    /// Field or column that holds the caption or a list of them, by default `caption`.
    pub caption_field: Option<String>,
    /// What goes into the sample's `.json` besides several captions.
    pub keep: Keep,
}

/// Which further fields or columns of a row go into its `.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Keep {
    /// None; for folders of pictures, whose metadata are files of their own, all.
    #[default]
    Nothing,
    /// Those of these names.
    Fields(Vec<String>),
    /// All; of a Parquet file's those with numbers and texts.
    All,
}

/// How large images become smaller: as JPEG, without the metadata of the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reencode {
    /// The longer side of an image afterwards, in pixels; images that are no larger stay what they are.
    pub longest_side: u32,
    /// JPEG's quality, 1 to 100.
    pub quality: u8,
}

/// What packing made of the rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackReport {
    /// The shards, those of an earlier start among them.
    pub shards: Vec<PathBuf>,
    /// Samples in them.
    pub samples: u64,
    /// Rows that an earlier start had packed already.
    pub resumed_rows: u64,
    /// Bytes of the image files that were packed since.
    pub image_bytes: u64,
    /// Rows that were left out; `left_out.jsonl` beside the shards lists them.
    pub left_out: u64,
    /// The first 1,000 of them.
    pub problems: Vec<RowProblem>,
}

/// A row that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowProblem {
    /// Where it stands, as `captions.jsonl:4` or `train.parquet: row 4`.
    pub place: String,
    /// Its line, or its number among the rows of its file, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Packs the rows of a source into `00000.tar`, `00001.tar` and so on, each with its index beside it. Every image is
/// decoded once on the way, so that what lands in a shard can be read. A packing that was killed goes on behind its last
/// whole shard when it is started again with the same options, and ends with the same bytes.
///
/// # Errors
/// When the source cannot be used, the folder holds shards of another origin, a shard cannot be written, or no row is
/// usable.
pub fn pack(options: &PackOptions) -> Result<PackReport, DataError> {
    options.check()?;
    let (format, source) = source::open(options)?;
    options.refuse_out_in_source(format)?;
    let mut folder = Folder::open(&options.out, options.recorded(format), source.inputs()?)?;
    let resumed_rows = if folder.is_complete() { source.rows() } else { folder.next_row() };
    let mut image_bytes = 0;
    if !folder.is_complete() {
        let mut left_out = folder.left_out_rows();
        // What was packed up to an error stays, to go on from.
        match pack_rows(options, source.as_ref(), &mut folder, &mut left_out) {
            Ok(packed) => image_bytes = packed,
            Err(error) => {
                folder.abandon();
                return Err(error);
            }
        }
        if folder.shards().is_empty() {
            let first = left_out.first().map_or("none".to_owned(), |row| format!("{}: {}", row.place, row.reason));
            folder.abandon();
            return Err(DataError::NothingToPack { left_out: source.rows(), first });
        }
        folder.complete(&mut left_out)?;
    }
    Ok(PackReport {
        shards: folder.shards(),
        samples: folder.samples(),
        resumed_rows,
        image_bytes,
        left_out: folder.left_out(),
        problems: folder.first_left_out(PROBLEMS_TOLD)?,
    })
}

/// Packs the rows that no shard has yet; returns the bytes of their image files.
fn pack_rows(
    options: &PackOptions,
    source: &dyn Source,
    folder: &mut Folder,
    left_out: &mut LeftOutRows,
) -> Result<u64, DataError> {
    let done = folder.next_row();
    let mut rows = PreparedRows {
        rows: source.read(done),
        reencode: options.reencode,
        ready: VecDeque::new(),
        taken: done,
        image_bytes: 0,
        prepared: 0,
        to_prepare: source.rows().saturating_sub(done),
        progress: options.progress.as_deref(),
        left_out,
        unread: None,
    };
    while let Some(first) = rows.next()? {
        let path = folder.next_shard();
        let staged = atomic::stage(&path, |out| write_shard(out, first, &mut rows, options.shard_samples));
        // The source's own error, not that of the writer which it interrupted.
        if let Some(error) = rows.unread.take() {
            return Err(error);
        }
        let (staged, written) = staged.map_err(DataError::io(&path))?;
        folder.take(staged, written, rows.taken, rows.left_out)?;
    }
    Ok(rows.image_bytes)
}

/// The rows of a source, prepared some at a time and handed out in their order.
struct PreparedRows<'a> {
    rows: RowIter<'a>,
    reencode: Option<Reencode>,
    ready: VecDeque<Prepared>,
    /// Rows that were handed out or left out.
    taken: u64,
    /// Of the image files of those that were handed out.
    image_bytes: u64,
    prepared: u64,
    to_prepare: u64,
    progress: Option<&'a (dyn Fn(u64, u64) + Send + Sync)>,
    left_out: &'a mut LeftOutRows,
    /// What ended the rows before their end.
    unread: Option<DataError>,
}

impl PreparedRows<'_> {
    /// The next row that can be written.
    fn next(&mut self) -> Result<Option<Packable>, DataError> {
        loop {
            if let Some(row) = self.next_ready()? {
                return Ok(Some(row));
            }
            let rows = self.read()?;
            if rows.is_empty() {
                return Ok(None);
            }
            self.take(prepare_all(rows, self.reencode))?;
        }
    }

    /// The same of those that are prepared already.
    fn next_ready(&mut self) -> Result<Option<Packable>, DataError> {
        while let Some(row) = self.ready.pop_front() {
            self.taken += 1;
            match row {
                Ok(row) => {
                    self.image_bytes += row.file_bytes;
                    return Ok(Some(row));
                }
                Err(problem) => self.left_out.push(problem)?,
            }
        }
        Ok(None)
    }

    /// Adds what is ready to `lot`, up to `most` rows, and gives the rows to be prepared next.
    fn fill(&mut self, lot: &mut Vec<Packable>, most: usize) -> Result<Vec<Row>, DataError> {
        while lot.len() < most {
            match self.next_ready()? {
                Some(row) => lot.push(row),
                None => break,
            }
        }
        if self.ready.is_empty() { self.read() } else { Ok(Vec::new()) }
    }

    /// The rows to be prepared when none is ready any more; none at the end.
    fn read(&mut self) -> Result<Vec<Row>, DataError> {
        let at_once = ROWS_A_THREAD * rayon::current_num_threads().max(4);
        self.rows.by_ref().take(at_once).collect()
    }

    fn take(&mut self, prepared: Result<Vec<Prepared>, DataError>) -> Result<(), DataError> {
        let prepared = prepared?;
        self.prepared += prepared.len() as u64;
        self.ready.extend(prepared);
        if let Some(progress) = self.progress {
            progress(self.prepared, self.to_prepare);
        }
        Ok(())
    }
}

fn prepare_all(rows: Vec<Row>, reencode: Option<Reencode>) -> Result<Vec<Prepared>, DataError> {
    rows.into_par_iter().map(|row| prepare(row, reencode)).collect()
}

/// A shard that was written.
struct Written {
    samples: u64,
    /// Of its bytes.
    digest: Digest,
}

/// Writes up to `samples` rows, and prepares the next ones meanwhile.
fn write_shard(
    out: &mut BufWriter<&File>,
    first: Packable,
    rows: &mut PreparedRows<'_>,
    samples: usize,
) -> io::Result<Written> {
    let mut archive = tar::Builder::new(DigestWriter::new(out));
    let (mut next, mut written) = (Some(first), 0);
    while let Some(first) = next {
        let mut lot = vec![first];
        let read = rows.fill(&mut lot, samples - written);
        let ahead = interrupted(read, rows)?;
        let reencode = rows.reencode;
        let write = || lot.iter().try_for_each(|row| append_row(&mut archive, row));
        let (wrote, prepared) = rayon::join(write, || prepare_all(ahead, reencode));
        wrote?;
        let taken = rows.take(prepared);
        interrupted(taken, rows)?;
        written += lot.len();
        next = match written < samples {
            true => {
                let row = rows.next();
                interrupted(row, rows)?
            }
            false => None,
        };
    }
    let (_, _, digest) = archive.into_inner()?.finish();
    Ok(Written { samples: written as u64, digest })
}

/// Keeps the source's own error, which the writer cannot tell.
fn interrupted<T>(result: Result<T, DataError>, rows: &mut PreparedRows<'_>) -> io::Result<T> {
    result.map_err(|error| {
        rows.unread = Some(error);
        io::Error::other("the source cannot be read on")
    })
}

fn append_row(archive: &mut tar::Builder<impl Write>, row: &Packable) -> io::Result<()> {
    append(archive, &format!("{:09}.{}", row.number, row.extension), &row.image)?;
    append(archive, &format!("{:09}.txt", row.number), row.caption.as_bytes())?;
    match &row.json {
        Some(json) => append(archive, &format!("{:09}.json", row.number), json),
        None => Ok(()),
    }
}

fn append(archive: &mut tar::Builder<impl Write>, name: &str, data: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    archive.append_data(&mut header, name, data)
}

impl PackOptions {
    fn check(&self) -> Result<(), DataError> {
        let refuse = |option: &'static str, expected: &str, got: u64| {
            Err(DataError::Option { option, expected: expected.to_owned(), got: got.to_string() })
        };
        if self.shard_samples == 0 {
            return refuse("shard_samples", "at least 1", 0);
        }
        match self.reencode {
            Some(Reencode { longest_side: 0, .. }) => refuse("longest_side", "at least 1", 0),
            Some(Reencode { quality, .. }) if !(1..=100).contains(&quality) => {
                refuse("quality", "1 to 100", quality.into())
            }
            _ => Ok(()),
        }
    }

    /// What packing writes must not be taken for what it reads.
    fn refuse_out_in_source(&self, format: SourceFormat) -> Result<(), DataError> {
        let (source, out) = (real(&self.source), real(&self.out));
        let inside = match format {
            SourceFormat::Img2dataset => out.starts_with(&source),
            _ => out == source,
        };
        match inside {
            false => Ok(()),
            true => Err(DataError::Source {
                path: self.out.clone(),
                reason: format!("lies in {}, which is packed; choose a folder beside it", self.source.display()),
            }),
        }
    }

    /// What `pack.json` keeps of the options: all that the shards' bytes depend on.
    fn recorded(&self, format: SourceFormat) -> Map<String, Value> {
        let Reading { images, image_field, caption_field, keep } = &self.reading;
        let keep = match keep {
            Keep::Nothing => Value::Null,
            Keep::Fields(names) => json!(names),
            Keep::All => json!("all"),
        };
        let fields = [
            ("format", json!(format)),
            ("images", json!(images)),
            ("image_field", json!(image_field)),
            ("caption_field", json!(caption_field)),
            ("keep", keep),
            ("shard_samples", json!(self.shard_samples)),
            ("longest_side", json!(self.reencode.map(|reencode| reencode.longest_side))),
            ("quality", json!(self.reencode.map(|reencode| reencode.quality))),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// The path without links, as far as it is there.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find_map(|ancestor| Some((ancestor, ancestor.canonicalize().ok()?)));
    match there {
        Some((ancestor, real)) => path.strip_prefix(ancestor).map_or_else(|_| path.clone(), |rest| real.join(rest)),
        None => path,
    }
}

impl Reading {
    /// Where the image paths of a file start.
    fn images_beside(&self, path: &Path) -> PathBuf {
        self.images.clone().unwrap_or_else(|| path.parent().unwrap_or(Path::new(".")).to_owned())
    }

    /// Whether a field is named other than by default.
    fn names_a_field(&self) -> bool {
        self.image_field.is_some() || self.caption_field.is_some()
    }

    /// Refuses names of fields for a format whose fields have their names.
    fn refuse_fields(&self, format: SourceFormat) -> Result<(), DataError> {
        let named = [("image_field", &self.image_field), ("caption_field", &self.caption_field)];
        match named.into_iter().find_map(|(option, name)| Some((option, name.clone()?))) {
            None => Ok(()),
            Some((option, got)) => {
                let expected = format!("none, since format {format} has names of its own");
                Err(DataError::Option { option, expected, got })
            }
        }
    }
}
