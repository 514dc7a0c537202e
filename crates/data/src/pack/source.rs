//! What is packed: files or a folder, of one format.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::PackOptions;
use super::captions::{CaptionFiles, is_captions_file};
use super::coco::Coco;
use super::pairs::{Pairs, holds_pictures};
#[cfg(feature = "parquet")]
use super::parquet::ParquetFiles;
use super::row::Row;
use super::visual_genome::VisualGenome;
use crate::shards::index::Stamp;
use crate::shards::patterns::expand_files;
use crate::{DataError, Extension};

/// How what is packed is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceFormat {
    /// Chosen by names and first bytes.
    Auto,
    /// Captions files: `.jsonl`, `.csv`, `.tsv`, or `.json` with a list of objects.
    Captions,
    /// Folders of `KEY.jpg`, `KEY.txt` and `KEY.json`, as img2dataset's format `files` writes them.
    Img2dataset,
    /// COCO captions: one object with `images` and `annotations`.
    Coco,
    /// Visual Genome's region descriptions.
    VisualGenome,
    /// Parquet files with images inside, as Hugging Face's datasets are.
    Parquet,
}

impl fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceFormat::Auto => "auto",
            SourceFormat::Captions => "captions",
            SourceFormat::Img2dataset => "img2dataset",
            SourceFormat::Coco => "coco",
            SourceFormat::VisualGenome => "visual-genome",
            SourceFormat::Parquet => "parquet",
        })
    }
}

/// A file or folder that rows come from, as `pack.json` knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Input {
    /// Its name; below the source where that is a folder of folders.
    pub(crate) name: String,
    /// Bytes of a file, pictures of a folder.
    pub(crate) size: u64,
    /// When a file was written last, or a name in a folder changed, since 1970; `None` in a `pack.json` that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtime_ns: Option<u64>,
}

impl Input {
    /// The file or folder at `path`, which is called so and has this size.
    pub(crate) fn of(path: &Path, name: String, size: u64) -> Result<Input, DataError> {
        let stamp = Stamp::of(path).map_err(DataError::io(path))?;
        Ok(Input { name, size, mtime_ns: Some(stamp.mtime_ns) })
    }

    /// Why this is not `other`, which was there when packing began; `None` where nothing says so.
    pub(crate) fn difference(&self, other: &Input) -> Option<String> {
        let shown =
            |input: &Input| format!("{} of size {}", if input.name.is_empty() { "." } else { &input.name }, input.size);
        if (&self.name, self.size) != (&other.name, other.size) {
            return Some(format!("{} there, {} now", shown(other), shown(self)));
        }
        let (now, then) = self.mtime_ns.zip(other.mtime_ns)?;
        (now != then).then(|| format!("{} was modified since, at the same size", shown(self)))
    }
}

/// The rows in their order; an error ends them.
pub(crate) type RowIter<'a> = Box<dyn Iterator<Item = Result<Row, DataError>> + 'a>;

/// A source that has been looked through once.
pub(crate) trait Source {
    /// What its rows come from.
    fn inputs(&self) -> Result<Vec<Input>, DataError>;
    /// Number of its rows.
    fn rows(&self) -> u64;
    /// Its rows from number `from` on, counted from 0.
    fn read(&self, from: u64) -> RowIter<'_>;
}

pub(crate) fn file_input(path: &Path) -> Result<Input, DataError> {
    let size = fs::metadata(path).map_err(DataError::io(path))?.len();
    Input::of(path, file_name(path).to_string(), size)
}

/// The file's name, for messages.
pub(crate) fn file_name(path: &Path) -> Arc<str> {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into()
}

/// Opens what `options` name, with the format that was found.
pub(crate) fn open(options: &PackOptions) -> Result<(SourceFormat, Box<dyn Source>), DataError> {
    let (paths, found) = locate(&options.source, options.format)?;
    let format = match options.format {
        SourceFormat::Auto => found()?,
        format => format,
    };
    let reading = &options.reading;
    let single = |paths: Vec<PathBuf>| match <[PathBuf; 1]>::try_from(paths) {
        Ok([path]) => Ok(path),
        Err(paths) => {
            Err(refuse(&options.source, format!("{} files where one of format {format} is packed", paths.len())))
        }
    };
    let source: Box<dyn Source> = match format {
        SourceFormat::Captions | SourceFormat::Auto => Box::new(CaptionFiles::open(paths, reading)?),
        SourceFormat::Img2dataset => {
            reading.refuse_fields(format)?;
            Box::new(Pairs::open(paths, reading)?)
        }
        SourceFormat::Coco => Box::new(Coco::open(&single(paths)?, reading)?),
        SourceFormat::VisualGenome => {
            reading.refuse_fields(format)?;
            Box::new(VisualGenome::open(&single(paths)?, reading)?)
        }
        #[cfg(feature = "parquet")]
        SourceFormat::Parquet => Box::new(ParquetFiles::open(paths, reading)?),
        #[cfg(not(feature = "parquet"))]
        SourceFormat::Parquet => {
            let reason = "this build reads no Parquet; build it with the cargo feature parquet".to_owned();
            return Err(refuse(&options.source, reason));
        }
    };
    Ok((format, source))
}

fn refuse(path: &Path, reason: impl Into<String>) -> DataError {
    DataError::Source { path: path.to_owned(), reason: reason.into() }
}

type Finding = Box<dyn FnOnce() -> Result<SourceFormat, DataError>>;

/// The files or the folder that a source names, and how their format is found.
fn locate(source: &Path, format: SourceFormat) -> Result<(Vec<PathBuf>, Finding), DataError> {
    if source.is_dir() {
        return locate_in_folder(source, format);
    }
    let paths = match source.to_str() {
        Some(pattern) if !source.exists() && pattern.contains(['*', '?', '[', '{']) => expand_files(pattern)?,
        _ => vec![source.to_owned()],
    };
    for path in &paths {
        fs::metadata(path).map_err(DataError::io(path))?;
    }
    let looked_at = paths.clone();
    Ok((paths, Box::new(move || of_files(&looked_at))))
}

fn of_files(paths: &[PathBuf]) -> Result<SourceFormat, DataError> {
    let mut formats = paths.iter().map(|path| of_file(path));
    let first = formats.next().unwrap_or_else(|| Err(refuse(Path::new("."), "names no file")))?;
    for (path, format) in paths[1..].iter().zip(formats) {
        let format = format?;
        if format != first {
            return Err(refuse(
                path,
                format!("its format is {format}, that of the first file {first}; pack them apart"),
            ));
        }
    }
    Ok(first)
}

fn of_file(path: &Path) -> Result<SourceFormat, DataError> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("parquet") => Ok(SourceFormat::Parquet),
        Some("json") => of_json(path),
        Some("tar") => Err(refuse(path, ALREADY_SHARDS)),
        _ if is_captions_file(path) => Ok(SourceFormat::Captions),
        _ => Err(refuse(path, "not known by its name (.jsonl, .csv, .tsv, .json, .parquet); name its format")),
    }
}

const ALREADY_SHARDS: &str =
    "tar files are shards already and need no packing: train with them as they are, or run `blip2 shards index`";

/// What a folder holds, at its top and in the folders right below.
struct Listing {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Listing {
    fn of(folder: &Path) -> Result<Listing, DataError> {
        let mut listing = Listing { files: Vec::new(), folders: Vec::new() };
        for entry in fs::read_dir(folder).map_err(DataError::io(folder))? {
            let path = entry.map_err(DataError::io(folder))?.path();
            if path.is_dir() { &mut listing.folders } else { &mut listing.files }.push(path);
        }
        listing.files.sort();
        listing.folders.sort();
        Ok(listing)
    }

    fn with_extension(&self, wanted: &str) -> Vec<PathBuf> {
        let has = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == wanted);
        self.files.iter().filter(has).cloned().collect()
    }

    fn is_named(&self, end: &str) -> bool {
        self.files.iter().any(|path| path.to_string_lossy().ends_with(end))
    }
}

fn locate_in_folder(folder: &Path, format: SourceFormat) -> Result<(Vec<PathBuf>, Finding), DataError> {
    let found = |paths: Vec<PathBuf>, format: SourceFormat| -> Result<(Vec<PathBuf>, Finding), DataError> {
        Ok((paths, Box::new(move || Ok(format))))
    };
    let listing = Listing::of(folder)?;
    let auto = format == SourceFormat::Auto;
    let whole = vec![folder.to_owned()];
    // What img2dataset leaves beside each of its folders or tar files.
    let img2dataset = listing.is_named("_stats.json");
    if format == SourceFormat::Img2dataset || (auto && img2dataset) {
        if listing.with_extension("tar").is_empty() || holds_pictures(folder)? {
            return found(whole, SourceFormat::Img2dataset);
        }
        return Err(refuse(folder, ALREADY_SHARDS));
    }
    if auto || format == SourceFormat::Captions {
        let files: Vec<PathBuf> = listing.files.iter().filter(|path| is_captions_file(path)).cloned().collect();
        match files.len() {
            0 => {}
            1 => return found(files, SourceFormat::Captions),
            _ => {
                let names: Vec<_> = files.iter().map(|path| file_name(path)).collect();
                return Err(refuse(folder, format!("holds several captions files ({}); name one", names.join(", "))));
            }
        }
    }
    if auto || format == SourceFormat::Parquet {
        let mut files = listing.with_extension("parquet");
        let below = folder.join("data");
        if files.is_empty() && below.is_dir() {
            files = Listing::of(&below)?.with_extension("parquet");
        }
        if !files.is_empty() {
            one_split(folder, &files)?;
            return found(files, SourceFormat::Parquet);
        }
    }
    if auto && holds_pictures(folder)? {
        return found(whole, SourceFormat::Img2dataset);
    }
    match listing.with_extension("tar").is_empty() {
        false => Err(refuse(folder, ALREADY_SHARDS)),
        true if auto => {
            Err(refuse(folder, "holds no captions file, no Parquet file and no pictures with texts beside them"))
        }
        true => Err(refuse(folder, format!("holds no file of format {format}"))),
    }
}

/// Training and test data must not be packed together because they lie in one folder.
fn one_split(folder: &Path, files: &[PathBuf]) -> Result<(), DataError> {
    let split = |path: &PathBuf| {
        let name = file_name(path);
        name.split_once('-').filter(|(_, rest)| rest.contains("-of-")).map(|(split, _)| split.to_owned())
    };
    let splits: BTreeSet<String> = files.iter().filter_map(split).collect();
    match splits.len() {
        0 | 1 => Ok(()),
        _ => {
            let names: Vec<String> = splits.into_iter().collect();
            let one = format!("{}-*.parquet", names[names.len() - 1]);
            Err(refuse(folder, format!("holds several splits ({}); name one, as '{one}'", names.join(", "))))
        }
    }
}

/// Tells COCO's object, Visual Genome's list and a list of captions apart by the names of their first fields.
fn of_json(path: &Path) -> Result<SourceFormat, DataError> {
    let file = BufReader::new(File::open(path).map_err(DataError::io(path))?);
    let mut names = Names::default();
    // The error that ends the reading early is no error; a file that is damaged is told of when it is read.
    let _ = names.deserialize(&mut serde_json::Deserializer::from_reader(file));
    let has = |name: &str| names.found.iter().any(|found| found == name);
    match names.list {
        false if has("images") || has("annotations") => Ok(SourceFormat::Coco),
        false => {
            Err(refuse(path, "neither COCO captions (images, annotations) nor a list of regions or captions in JSON"))
        }
        true if has("regions") || has("phrase") => Ok(SourceFormat::VisualGenome),
        true => Ok(SourceFormat::Captions),
    }
}

/// The names of an object's fields, or of those of a list's first object.
#[derive(Default)]
struct Names {
    list: bool,
    found: Vec<String>,
}

impl<'de> DeserializeSeed<'de> for &mut Names {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Names {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            self.found.push(name);
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.list = true;
        list.next_element_seed(self).map(|_| ())
    }
}

/// Whether a file's name is that of a picture.
pub(crate) fn is_picture(extension: &str) -> bool {
    Extension::from_lower_case(extension).is_some_and(Extension::is_image)
}
