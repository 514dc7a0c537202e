//! COCO captions: one object in JSON with `images` and `annotations`. The file is held in memory, the pictures are not.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::row::{Content, ImageSource, Place, Row, RowData};
use super::source::{Input, RowIter, Source, file_input, file_name};
use super::{CAPTION_FIELD, Reading};
use crate::DataError;

/// The images in their order, and behind them the images that only annotations know.
pub(crate) struct Coco {
    path: PathBuf,
    images_at: PathBuf,
    reading: Reading,
    images: Vec<Map<String, Value>>,
    /// Captions of image i, in the order of the annotations.
    captions: Vec<Vec<String>>,
    /// Image ids of annotations that `images` lacks, in their order, with the number of annotations.
    unknown: Vec<(Id, u64)>,
}

/// An image's id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(untagged)]
pub(crate) enum Id {
    Number(u64),
    Text(String),
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Id::Number(number) => write!(f, "{number}"),
            Id::Text(text) => f.write_str(text),
        }
    }
}

#[derive(Deserialize)]
struct Layout {
    images: Vec<Map<String, Value>>,
    annotations: Vec<Map<String, Value>>,
}

impl Coco {
    pub(crate) fn open(path: &Path, reading: &Reading) -> Result<Coco, DataError> {
        let refuse = |reason: String| DataError::Source { path: path.to_owned(), reason };
        let file = BufReader::new(File::open(path).map_err(DataError::io(path))?);
        let Layout { images, annotations } = serde_json::from_reader(file)
            .map_err(|error| refuse(format!("not COCO captions (images, annotations): {error}")))?;
        let id_of = |object: &Map<String, Value>, name: &str| object.get(name).and_then(|id| Id::deserialize(id).ok());
        let mut places = HashMap::new();
        for (at, image) in images.iter().enumerate() {
            let id = id_of(image, "id").ok_or_else(|| refuse(format!("image {} has no id", at + 1)))?;
            if places.insert(id.clone(), at).is_some() {
                return Err(refuse(format!("two images have the id {id}")));
            }
        }
        let caption_field = reading.caption_field.as_deref().unwrap_or(CAPTION_FIELD);
        let mut captions = vec![Vec::new(); images.len()];
        let (mut unknown, mut seen) = (Vec::<(Id, u64)>::new(), HashMap::new());
        for (at, annotation) in annotations.into_iter().enumerate() {
            let missing = |name: &str| refuse(format!("annotation {} has no {name}; are these captions?", at + 1));
            let id = id_of(&annotation, "image_id").ok_or_else(|| missing("image_id"))?;
            let caption =
                annotation.get(caption_field).and_then(Value::as_str).ok_or_else(|| missing(caption_field))?;
            match places.get(&id) {
                Some(&place) => captions[place].push(caption.to_owned()),
                None => {
                    let place = *seen.entry(id.clone()).or_insert(unknown.len());
                    if place == unknown.len() {
                        unknown.push((id, 0));
                    }
                    unknown[place].1 += 1;
                }
            }
        }
        if images.is_empty() {
            return Err(refuse("it holds no image".to_owned()));
        }
        let images_at = reading.images_beside(path);
        Ok(Coco { path: path.to_owned(), images_at, reading: reading.clone(), images, captions, unknown })
    }

    fn content(&self, at: usize) -> Result<Content, String> {
        let mut image = self.images[at].clone();
        let name = self.reading.image_field.as_deref().unwrap_or("file_name");
        let file = image.get(name).and_then(Value::as_str).ok_or_else(|| format!("no text field \"{name}\""))?;
        let path = self.images_at.join(file);
        let captions = self.captions[at].clone();
        if captions.is_empty() {
            return Err("no annotation names it".to_owned());
        }
        let fields = self.reading.keep.of(&mut image, &[name]);
        Ok(Content { image: ImageSource::Files(vec![path]), captions, fields })
    }
}

impl Source for Coco {
    fn inputs(&self) -> Result<Vec<Input>, DataError> {
        Ok(vec![file_input(&self.path)?])
    }

    fn rows(&self) -> u64 {
        (self.images.len() + self.unknown.len()) as u64
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let file = file_name(&self.path);
        Box::new((from..self.rows()).map(move |row| {
            let at = row as usize;
            let data = match at.checked_sub(self.images.len()) {
                None => self.content(at).map(RowData::Content),
                Some(at) => {
                    let (id, annotations) = &self.unknown[at];
                    Err(format!("{annotations} annotations name image {id}, which images does not list"))
                }
            };
            let number = row + 1;
            Ok(Row { number, place: Place::Numbered { file: file.clone(), what: "image", number }, data })
        }))
    }
}
