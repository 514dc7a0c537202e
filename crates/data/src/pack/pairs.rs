//! Folders of pictures with texts beside them: `KEY.jpg`, `KEY.txt`, `KEY.json`, as img2dataset's format `files` writes
//! them, in folders of any depth. Each folder is listed when its turn comes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::row::{Content, ImageSource, Place, Row, RowData, Unusable, captions, read_bounded};
use super::source::{Input, RowIter, Source, is_picture};
use super::{CAPTION_FIELD, Keep, Reading};
use crate::DataError;
use crate::pack::lines::utf8;
use crate::shards::index::MAX_TEXT_BYTES;

/// Folders deeper than this are taken for links that lead in a circle.
const MAX_DEPTH: usize = 16;

/// The folders, in the order of their names.
pub(crate) struct Pairs {
    folders: Vec<Folder>,
    keep: Keep,
}

struct Folder {
    /// Below the source; empty for the source itself.
    name: String,
    path: PathBuf,
    rows: u64,
}

/// The files of one sample.
#[derive(Default, Clone)]
pub(crate) struct PairFiles {
    image: Option<PathBuf>,
    text: Option<PathBuf>,
    json: Option<PathBuf>,
    keep: Keep,
    /// The picture that has the key already.
    instead: Option<PathBuf>,
}

impl Pairs {
    pub(crate) fn open(sources: Vec<PathBuf>, reading: &Reading) -> Result<Pairs, DataError> {
        let mut folders = Vec::new();
        for source in &sources {
            if !source.is_dir() {
                let reason = "is no folder; format img2dataset is a folder of pictures, texts and metadata".to_owned();
                return Err(DataError::Source { path: source.clone(), reason });
            }
            walk(source, String::new(), 0, &mut |name, path| {
                let rows = list(path)?.len() as u64;
                if rows > 0 {
                    folders.push(Folder { name, path: path.to_owned(), rows });
                }
                Ok(true)
            })?;
        }
        match (folders.is_empty(), sources.first()) {
            (true, Some(source)) => {
                Err(DataError::Source { path: source.clone(), reason: "holds no pictures".to_owned() })
            }
            _ => Ok(Pairs { folders, keep: reading.keep.clone() }),
        }
    }
}

impl Source for Pairs {
    fn inputs(&self) -> Result<Vec<Input>, DataError> {
        self.folders.iter().map(|folder| Input::of(&folder.path, folder.name.clone(), folder.rows)).collect()
    }

    fn rows(&self) -> u64 {
        self.folders.iter().map(|folder| folder.rows).sum()
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let mut before = 0;
        let starts = self.folders.iter().map(move |folder| {
            before += folder.rows;
            (before - folder.rows, folder)
        });
        let left = starts.filter(move |(start, folder)| start + folder.rows > from);
        Box::new(left.flat_map(move |(start, folder)| {
            let rows: RowIter<'_> = match list(&folder.path) {
                Err(error) => Box::new(std::iter::once(Err(error))),
                // A folder that changed under our hands would give other rows after a restart.
                Ok(listed) if listed.len() as u64 != folder.rows => {
                    let reason = format!("had {} samples when packing began, and {} now", folder.rows, listed.len());
                    Box::new(std::iter::once(Err(DataError::Source { path: folder.path.clone(), reason })))
                }
                Ok(listed) => Box::new(listed.into_iter().enumerate().map(move |(at, (key, files))| {
                    let number = start + at as u64 + 1;
                    let name = if folder.name.is_empty() { key } else { format!("{}/{key}", folder.name) };
                    let files = PairFiles { keep: self.keep.clone(), ..files };
                    Ok(Row { number, place: Place::Named { name, number }, data: Ok(RowData::Files(files)) })
                })),
            };
            rows.skip(from.saturating_sub(start) as usize)
        }))
    }
}

/// Whether a folder, or one below it, holds a picture with a text or metadata beside it.
pub(crate) fn holds_pictures(folder: &Path) -> Result<bool, DataError> {
    let mut found = false;
    walk(folder, String::new(), 0, &mut |_, path| {
        found =
            list(path)?.values().any(|files| files.image.is_some() && (files.text.is_some() || files.json.is_some()));
        Ok(!found)
    })?;
    Ok(found)
}

/// Calls `visit` for the folder and all below it, in the order of their names, until it says no.
fn walk(
    folder: &Path,
    name: String,
    depth: usize,
    visit: &mut impl FnMut(String, &Path) -> Result<bool, DataError>,
) -> Result<bool, DataError> {
    if depth > MAX_DEPTH {
        let reason = format!("is more than {MAX_DEPTH} folders deep; does a link lead back?");
        return Err(DataError::Source { path: folder.to_owned(), reason });
    }
    if !visit(name.clone(), folder)? {
        return Ok(false);
    }
    for (below, path) in entries(folder)?.into_iter().filter(|(_, path)| path.is_dir()) {
        let name = if name.is_empty() { below } else { format!("{name}/{below}") };
        if !walk(&path, name, depth + 1, visit)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What lies in a folder and is not hidden, by name.
fn entries(folder: &Path) -> Result<BTreeMap<String, PathBuf>, DataError> {
    let mut entries = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(DataError::io(folder))? {
        let path = entry.map_err(DataError::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        // One in the place of the other would be lost.
        if entries.insert(name, path.clone()).is_some() {
            let reason =
                "its name is not UTF-8, and that of another file is shown alike; rename one of them".to_owned();
            return Err(DataError::Source { path, reason });
        }
    }
    Ok(entries)
}

/// The samples of a folder by their keys: what pictures, texts and metadata share the name in front of the last dot.
fn list(folder: &Path) -> Result<BTreeMap<String, PairFiles>, DataError> {
    let mut samples: BTreeMap<String, PairFiles> = BTreeMap::new();
    for (name, path) in entries(folder)? {
        // img2dataset's own summary of a folder.
        if name.ends_with("_stats.json") {
            continue;
        }
        let Some((key, extension)) = name.rsplit_once('.') else { continue };
        let extension = extension.to_lowercase();
        let is_image = is_picture(&extension);
        if !(is_image || extension == "txt" || extension == "json") || path.is_dir() {
            continue;
        }
        // Of two pictures with one key the first by name is the sample's; the other is told of.
        let taken = samples.get(key).and_then(|sample| sample.image.clone()).filter(|_| is_image);
        if let Some(instead) = taken {
            let second = PairFiles { image: Some(path), instead: Some(instead), ..PairFiles::default() };
            samples.insert(format!("{name} (a second picture)"), second);
            continue;
        }
        let sample = samples.entry(key.to_owned()).or_default();
        let slot = match extension.as_str() {
            "txt" => &mut sample.text,
            "json" => &mut sample.json,
            _ => &mut sample.image,
        };
        slot.get_or_insert(path);
    }
    // A text alone may be a README.
    samples.retain(|_, sample| sample.image.is_some() || sample.json.is_some());
    Ok(samples)
}

impl PairFiles {
    /// Text and metadata of the sample; the picture stays where it is.
    pub(crate) fn read(self) -> Result<Content, Unusable> {
        if let Some(instead) = &self.instead {
            return Err(format!("{} has the same key and is packed", instead.display()).into());
        }
        let read = |path: &PathBuf| -> Result<String, Unusable> {
            let bytes = read_bounded(path, MAX_TEXT_BYTES)?;
            Ok(utf8(&bytes).map(str::to_owned).map_err(|reason| format!("{}: {reason}", path.display()))?)
        };
        let mut metadata = match &self.json {
            None => Map::new(),
            Some(path) => serde_json::from_str(&read(path)?)
                .map_err(|error| format!("{}: not an object in JSON: {error}", path.display()))?,
        };
        let Some(image) = self.image else {
            return Err(no_image(&metadata).into());
        };
        let captions = match &self.text {
            Some(path) => vec![read(path)?],
            None => metadata.get(CAPTION_FIELD).and_then(captions).unwrap_or_default(),
        };
        // The metadata are the sample's already, so they stay whole unless fields are named.
        let fields = match &self.keep {
            Keep::Fields(_) => self.keep.of(&mut metadata, &[]),
            Keep::Nothing | Keep::All => metadata,
        };
        Ok(Content { image: ImageSource::Files(vec![image]), captions, fields })
    }
}

/// What img2dataset says of a download that failed.
fn no_image(metadata: &Map<String, Value>) -> String {
    let said = ["status", "error_message"].map(|name| metadata.get(name).and_then(Value::as_str));
    match said.into_iter().flatten().collect::<Vec<_>>().join(": ") {
        said if said.is_empty() => "no picture beside it".to_owned(),
        said => format!("no picture beside it ({said})"),
    }
}
