//! Visual Genome's `region_descriptions.json`: a list of images with their regions, or a flat list of regions. All
//! phrases of an image are its captions. The file is held in memory, the pictures are not.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::coco::Id;
use super::row::{Content, ImageSource, Place, Row, RowData};
use super::source::{Input, RowIter, Source, file_input, file_name};
use super::{Keep, Reading};
use crate::DataError;

/// Where Visual Genome's two archives put the pictures, below the folder of images.
const FOLDERS: [&str; 3] = ["", "VG_100K", "VG_100K_2"];

/// The images, in the order in which their first region stands.
pub(crate) struct VisualGenome {
    path: PathBuf,
    images_at: PathBuf,
    keep: Keep,
    images: Vec<(Id, Vec<String>)>,
}

/// An image with its regions, or a region; of what else a region says nothing is held.
#[derive(Deserialize)]
struct Entry {
    id: Option<Id>,
    image_id: Option<Id>,
    phrase: Option<String>,
    regions: Option<Vec<Region>>,
}

#[derive(Deserialize)]
struct Region {
    image_id: Option<Id>,
    phrase: Option<String>,
}

impl VisualGenome {
    pub(crate) fn open(path: &Path, reading: &Reading) -> Result<VisualGenome, DataError> {
        let refuse = |reason: String| DataError::Source { path: path.to_owned(), reason };
        let file = BufReader::new(File::open(path).map_err(DataError::io(path))?);
        let entries: Vec<Entry> = serde_json::from_reader(file)
            .map_err(|error| refuse(format!("not Visual Genome's list of regions: {error}")))?;
        let mut images = Images::default();
        for (at, entry) in entries.into_iter().enumerate() {
            let bad = |what: &str| refuse(format!("entry {}: {what}", at + 1));
            let own = entry.image_id.or(if entry.regions.is_some() { entry.id } else { None });
            let regions = entry.regions.unwrap_or_else(|| vec![Region { image_id: None, phrase: entry.phrase }]);
            // An image without regions is a row too, and is said to have no caption.
            if let (Some(id), true) = (&own, regions.is_empty()) {
                images.place(id.clone());
            }
            for region in regions {
                let id = region.image_id.or(own.clone()).ok_or_else(|| bad("a region without image_id"))?;
                let phrase = region.phrase.ok_or_else(|| bad("a region without phrase"))?;
                let place = images.place(id);
                images.list[place].1.push(phrase);
            }
        }
        if images.list.is_empty() {
            return Err(refuse("it holds no region".to_owned()));
        }
        let images_at = reading.images_beside(path);
        Ok(VisualGenome { path: path.to_owned(), images_at, keep: reading.keep.clone(), images: images.list })
    }

    fn content(&self, (id, phrases): &(Id, Vec<String>)) -> Content {
        let files = FOLDERS.iter().map(|folder| self.images_at.join(folder).join(format!("{id}.jpg"))).collect();
        let id = match id {
            Id::Number(number) => Value::from(*number),
            Id::Text(text) => Value::from(text.clone()),
        };
        let mut known = Map::from_iter([("image_id".to_owned(), id)]);
        let fields = self.keep.of(&mut known, &[]);
        Content { image: ImageSource::Files(files), captions: phrases.clone(), fields }
    }
}

#[derive(Default)]
struct Images {
    list: Vec<(Id, Vec<String>)>,
    places: HashMap<Id, usize>,
}

impl Images {
    fn place(&mut self, id: Id) -> usize {
        *self.places.entry(id).or_insert_with_key(|id| {
            self.list.push((id.clone(), Vec::new()));
            self.list.len() - 1
        })
    }
}

impl Source for VisualGenome {
    fn inputs(&self) -> Result<Vec<Input>, DataError> {
        Ok(vec![file_input(&self.path)?])
    }

    fn rows(&self) -> u64 {
        self.images.len() as u64
    }

    fn read(&self, from: u64) -> RowIter<'_> {
        let file = file_name(&self.path);
        Box::new(self.images.iter().zip(1..).skip(from as usize).map(move |(image, number)| {
            let data = Ok(RowData::Content(self.content(image)));
            Ok(Row { number, place: Place::Numbered { file: file.clone(), what: "image", number }, data })
        }))
    }
}
