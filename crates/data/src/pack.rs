//! A folder of images and a file of captions become tar shards with their indices.
//!
//! The same rows give the same bytes: members carry no time and no owner, and a sample's key is the number of its line
//! in the captions file, which leads back from any later complaint to the row.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;

use crate::image::{ImageFormat, decode, inspect};
use crate::index::IndexedShard;
use crate::sample::guarded;
use crate::{DataError, SampleError, atomic};

/// Rows that are read and checked side by side.
const ROWS_AT_ONCE: usize = 64;

/// What is packed, and into what.
#[derive(Clone)]
pub struct PackOptions {
    /// `.jsonl` with an object a line, or `.tsv` with two columns or a header that names them.
    pub captions: PathBuf,
    /// Where the rows' image paths start; the captions file's folder when `None`.
    pub images: Option<PathBuf>,
    /// The folder that gets the shards.
    pub out: PathBuf,
    /// Samples a shard.
    pub shard_samples: usize,
    /// Field or column that holds the image's path.
    pub image_field: String,
    /// Field or column that holds the caption.
    pub caption_field: String,
    /// Called now and then with the number of rows done and of all.
    pub progress: Option<Arc<dyn Fn(usize, usize) + Send + Sync>>,
}

/// What packing made of the rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackReport {
    /// The shards that were written.
    pub shards: Vec<PathBuf>,
    /// Samples in them.
    pub samples: u64,
    /// Rows that were left out.
    pub problems: Vec<RowProblem>,
}

/// A row that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowProblem {
    /// Its line in the captions file, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// A line of the captions file.
struct Row {
    line: usize,
    /// Path of the image and the caption.
    fields: Result<(String, String), String>,
}

/// A row that can be written.
struct Packable {
    line: usize,
    extension: &'static str,
    image: Vec<u8>,
    caption: String,
}

/// Packs the rows of a captions file into `00000.tar`, `00001.tar` and so on, each with its index beside it. Every
/// image is decoded once on the way, so that what lands in a shard can be read.
///
/// # Errors
/// When the captions file cannot be used, the folder holds shards already, a shard cannot be written, or no row is
/// usable.
pub fn pack(options: &PackOptions) -> Result<PackReport, DataError> {
    if options.shard_samples == 0 {
        return Err(DataError::Option {
            option: "shard_samples",
            expected: "at least 1".to_owned(),
            got: "0".to_owned(),
        });
    }
    let rows = read_rows(options)?;
    refuse_to_overwrite(&options.out)?;
    let beside = options.captions.parent().unwrap_or(Path::new("."));
    let images = options.images.as_deref().unwrap_or(beside);

    let (mut shards, mut problems, mut samples, mut done) = (Vec::new(), Vec::new(), 0, 0);
    let mut packable = rows
        .chunks(ROWS_AT_ONCE)
        .flat_map(|chunk| {
            let checked: Vec<_> = chunk.par_iter().map(|row| check(row, images)).collect();
            done += chunk.len();
            if let Some(progress) = &options.progress {
                progress(done, rows.len());
            }
            checked
        })
        .filter_map(|row| row.map_err(|problem| problems.push(problem)).ok())
        .peekable();
    while packable.peek().is_some() {
        let path = options.out.join(format!("{:05}.tar", shards.len()));
        let mut next = packable.by_ref().take(options.shard_samples);
        samples += atomic::write(&path, |out| write_shard(out, &mut next)).map_err(DataError::io(&path))?;
        shards.push(IndexedShard::rebuild(&path, None)?.path);
    }
    drop(packable);
    match (samples, problems.first()) {
        (0, first) => Err(DataError::NoSamples {
            shards: 0,
            problems: problems.len(),
            first: first.map_or("none".to_owned(), |problem| format!("line {}: {}", problem.line, problem.reason)),
        }),
        _ => Ok(PackReport { shards, samples, problems }),
    }
}

fn refuse_to_overwrite(out: &Path) -> Result<(), DataError> {
    let entries = match fs::read_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(DataError::io(out))?,
    };
    for entry in entries {
        let path = entry.map_err(DataError::io(out))?.path();
        if path.extension().is_some_and(|extension| extension == "tar" || extension == "idx") {
            return Err(DataError::WouldOverwrite { path });
        }
    }
    Ok(())
}

fn read_rows(options: &PackOptions) -> Result<Vec<Row>, DataError> {
    let path = &options.captions;
    let refuse = |reason: String| DataError::Captions { path: path.clone(), reason };
    let text = fs::read(path).map_err(DataError::io(path))?;
    let text = String::from_utf8(text)
        .map_err(|error| refuse(format!("not UTF-8 from byte {} on", error.utf8_error().valid_up_to())))?;
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    let rows: Vec<Row> = match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl") => lines.map(|(line, text)| Row { line, fields: parse_json(text, options) }).collect(),
        Some("tsv") => parse_tsv(lines.collect(), options),
        _ => return Err(refuse("its name must end in .jsonl or .tsv".to_owned())),
    };
    if rows.is_empty() { Err(refuse("it holds no row".to_owned())) } else { Ok(rows) }
}

fn parse_json(text: &str, options: &PackOptions) -> Result<(String, String), String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?;
    let field = |name: &str| {
        let field = value.get(name).and_then(serde_json::Value::as_str);
        field.map(str::to_owned).ok_or_else(|| format!("no text field \"{name}\""))
    };
    Ok((field(&options.image_field)?, field(&options.caption_field)?))
}

/// A first line that holds both names says which columns count; else they are the first two.
fn parse_tsv(lines: Vec<(usize, &str)>, options: &PackOptions) -> Vec<Row> {
    let column = |name: &str| lines.first()?.1.split('\t').position(|column| column == name);
    let (columns, header) = match (column(&options.image_field), column(&options.caption_field)) {
        (Some(image), Some(caption)) => ((image, caption), 1),
        _ => ((0, 1), 0),
    };
    let parse = |text: &str| {
        let fields: Vec<&str> = text.split('\t').collect();
        match (fields.get(columns.0), fields.get(columns.1)) {
            (Some(image), Some(caption)) => Ok(((*image).to_owned(), (*caption).to_owned())),
            _ => Err(format!("{} columns where {} are needed", fields.len(), columns.0.max(columns.1) + 1)),
        }
    };
    lines.iter().skip(header).map(|&(line, text)| Row { line, fields: parse(text) }).collect()
}

fn check(row: &Row, images: &Path) -> Result<Packable, RowProblem> {
    let problem = |reason: String| RowProblem { line: row.line, reason };
    let (image, caption) = row.fields.as_ref().map_err(|reason| problem(reason.clone()))?;
    if caption.trim().is_empty() {
        return Err(problem(SampleError::CaptionEmpty.to_string()));
    }
    let path = images.join(image);
    let bytes = fs::read(&path).map_err(|error| problem(format!("{}: {error}", path.display())))?;
    let format = guarded(|| {
        decode(&bytes)?;
        Ok(inspect(&bytes)?.0)
    });
    let extension = match format.map_err(|error| problem(format!("{}: {error}", path.display())))? {
        ImageFormat::Jpeg => "jpg",
        ImageFormat::Png => "png",
        ImageFormat::WebP => "webp",
    };
    Ok(Packable { line: row.line, extension, image: bytes, caption: caption.clone() })
}

fn write_shard(out: &mut BufWriter<&File>, rows: &mut dyn Iterator<Item = Packable>) -> io::Result<u64> {
    let mut archive = tar::Builder::new(out);
    let mut samples = 0;
    for row in rows {
        append(&mut archive, &format!("{:09}.{}", row.line, row.extension), &row.image)?;
        append(&mut archive, &format!("{:09}.txt", row.line), row.caption.as_bytes())?;
        samples += 1;
    }
    archive.finish()?;
    Ok(samples)
}

fn append(archive: &mut tar::Builder<impl io::Write>, name: &str, data: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    archive.append_data(&mut header, name, data)
}
