//! Numbers of every sample of a shard, by which filters are decided: kept beside its index as `NAME.tar.attributes`.
//!
//! One JSON object: the version of the shard that the numbers belong to, and a list for each column. A column that a
//! filter asks for and that is not there is read from the shard once and added. An index alone says nothing of what the
//! members hold, so the version is more than its digest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::text::caption::{CaptionRule, JsonPath};
use crate::{DataError, atomic};

const FORMAT: &str = "blip2-shard-attributes";
const VERSION: u32 = 2;

/// A number that every sample has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Column {
    /// Pixels a row.
    Width,
    /// Rows.
    Height,
    /// Words of the caption.
    CaptionWords,
    /// A number in the `.json` member.
    Json(JsonPath),
}

impl Column {
    /// Its name in the file. What a caption is depends on the rule by which it is read.
    fn name(&self, captions: &CaptionRule) -> String {
        match self {
            Column::Width => "width".to_owned(),
            Column::Height => "height".to_owned(),
            Column::CaptionWords => format!("caption_words {:?}", captions.source),
            Column::Json(path) => format!("json {}", path.as_str()),
        }
    }
}

/// What the columns are read from.
pub(crate) struct Measured {
    /// Width and height.
    pub(crate) sides: Option<(usize, usize)>,
    /// Words of the caption.
    pub(crate) caption_words: Option<usize>,
    /// The `.json` member.
    pub(crate) json: Option<Value>,
}

/// Some columns of one shard.
pub(crate) struct Attributes {
    columns: Vec<(Column, Vec<Option<f64>>)>,
}

#[derive(Serialize, Deserialize)]
struct File {
    format: String,
    version: u32,
    shard: String,
    columns: BTreeMap<String, Vec<Option<f64>>>,
}

/// Where a shard's attributes are kept, and what they must fit.
pub(crate) struct AttributesFile<'a> {
    /// Where it may lie: beside the index, then elsewhere.
    pub(crate) places: Vec<PathBuf>,
    /// Those of them where it may be written.
    pub(crate) writable: Vec<PathBuf>,
    /// What is known of the shard's contents, its index among it.
    pub(crate) shard: &'a str,
    /// Number of its samples.
    pub(crate) samples: usize,
}

impl AttributesFile<'_> {
    /// The columns asked for, measured by `measure` where the file lacks one.
    pub(crate) fn get(
        &self,
        columns: &[Column],
        captions: &CaptionRule,
        measure: impl FnOnce() -> Result<Vec<Measured>, DataError>,
    ) -> Result<Attributes, DataError> {
        let mut file = self.find().unwrap_or_else(|| File {
            format: FORMAT.to_owned(),
            version: VERSION,
            shard: self.shard.to_owned(),
            columns: BTreeMap::new(),
        });
        let missing: Vec<&Column> =
            columns.iter().filter(|column| !file.columns.contains_key(&column.name(captions))).collect();
        if !missing.is_empty() {
            let measured = measure()?;
            // Others may have added columns meanwhile.
            if let Some(now) = self.find() {
                file.columns.extend(now.columns);
            }
            for column in missing {
                let values = measured.iter().map(|sample| value(column, sample)).collect();
                file.columns.insert(column.name(captions), values);
            }
            self.write(&file)?;
        }
        let take = |column: &Column| {
            let values = file.columns.get(&column.name(captions)).cloned().unwrap_or_default();
            (column.clone(), values)
        };
        Ok(Attributes { columns: columns.iter().map(take).collect() })
    }

    fn find(&self) -> Option<File> {
        self.places.iter().find_map(|path| self.read(path))
    }

    fn read(&self, path: &Path) -> Option<File> {
        // A file that is missing or of another version is not an error: the columns are measured.
        let file: File = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let fits = file.format == FORMAT && file.version == VERSION && file.shard == self.shard;
        (fits && file.columns.values().all(|values| values.len() == self.samples)).then_some(file)
    }

    fn write(&self, file: &File) -> Result<(), DataError> {
        let text = serde_json::json!(file).to_string();
        let mut last = None;
        for path in &self.writable {
            match atomic::write_own(path, FORMAT, text.as_bytes()) {
                Ok(()) => return Ok(()),
                Err(source) => last = Some(DataError::Io { path: path.clone(), source }),
            }
        }
        last.map_or(Ok(()), Err)
    }
}

fn value(column: &Column, sample: &Measured) -> Option<f64> {
    match column {
        Column::Width => sample.sides.map(|(width, _)| width as f64),
        Column::Height => sample.sides.map(|(_, height)| height as f64),
        Column::CaptionWords => sample.caption_words.map(|words| words as f64),
        Column::Json(path) => {
            let value = path.find(sample.json.as_ref()?)?;
            // img2dataset and others write some numbers as texts.
            value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|number| number.is_finite())
        }
    }
}

impl Attributes {
    /// A sample's value, where it has one.
    pub(crate) fn value(&self, column: &Column, at: usize) -> Option<f64> {
        let (_, values) = self.columns.iter().find(|(known, _)| known == column)?;
        values.get(at).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As when two runs with different filters open a set for the first time.
    #[test]
    fn columns_that_others_added_meanwhile_stay() {
        let folder = tempfile::tempdir().unwrap();
        let places = vec![folder.path().join("0.tar.attributes")];
        let file = AttributesFile { places: places.clone(), writable: places, shard: "version", samples: 1 };
        let measured = || Ok(vec![Measured { sides: Some((5, 4)), caption_words: None, json: None }]);
        let rule = CaptionRule::default();
        let get = |column: Column| file.get(&[column], &rule, measured);
        file.get(&[Column::Width], &rule, || {
            get(Column::Height)?;
            measured()
        })
        .unwrap();
        let both = [Column::Width, Column::Height];
        let attributes = file.get(&both, &rule, || panic!("they are there")).unwrap();
        assert_eq!(both.map(|column| attributes.value(&column, 0)), [Some(5.0), Some(4.0)]);
    }
}
