//! From a row to the members of its sample: the picture is decoded once, and shrunk where that is asked for.

use serde_json::Value;

use super::row::{Content, Row, RowData, Unusable};
use super::{Reencode, RowProblem};
use crate::image::{Filter, decode, encode_jpeg, fit, inspect};
use crate::loader::sample::guarded;
use crate::shards::index::Extension;
use crate::{DataError, SampleError};

/// A row that can be written.
pub(crate) struct Packable {
    pub(crate) number: u64,
    pub(crate) extension: &'static str,
    pub(crate) image: Vec<u8>,
    /// Of the image file, which may have been larger.
    pub(crate) file_bytes: u64,
    pub(crate) caption: String,
    /// All captions of several, and the metadata, as an object in JSON.
    pub(crate) json: Option<Vec<u8>>,
}

/// What is written of a row, or why it is left out.
pub(crate) type Prepared = Result<Packable, RowProblem>;

/// Checks a row and makes of it what is written.
///
/// # Errors
/// When this machine cannot read the row now.
pub(crate) fn prepare(row: Row, reencode: Option<Reencode>) -> Result<Prepared, DataError> {
    let Row { number, place, data } = row;
    match packable(number, data, reencode) {
        Ok(packable) => Ok(Ok(packable)),
        Err(Unusable::Row(reason)) => Ok(Err(RowProblem { place: place.to_string(), line: place.number(), reason })),
        Err(Unusable::Machine(error)) => Err(error),
    }
}

fn packable(number: u64, data: Result<RowData, String>, reencode: Option<Reencode>) -> Result<Packable, Unusable> {
    let content = match data? {
        RowData::Content(content) => content,
        RowData::Files(files) => files.read()?,
    };
    let Content { image, mut captions, mut fields } = content;
    captions.retain(|caption| !caption.trim().is_empty());
    let Some(caption) = captions.first().cloned() else {
        return Err(SampleError::CaptionEmpty.to_string().into());
    };
    let (name, image) = image.read()?;
    let file_bytes = image.len() as u64;
    let checked = guarded(|| check(image, reencode));
    let (extension, image) = checked.map_err(|error| format!("{name}: {error}"))?;
    if captions.len() > 1 {
        fields.insert("captions".to_owned(), Value::from(captions));
    }
    let json = (!fields.is_empty()).then(|| Value::Object(fields).to_string().into_bytes());
    for (kind, text) in [(Extension::Txt, Some(caption.as_bytes())), (Extension::Json, json.as_deref())] {
        let (bytes, max) = (text.map_or(0, |text| text.len() as u64), kind.max_bytes());
        if bytes > max {
            return Err(SampleError::MemberTooLarge { extension: kind.name(), bytes, max }.to_string().into());
        }
    }
    Ok(Packable { number, extension, image, file_bytes, caption, json })
}

/// The image's extension and bytes: its own, or those of a smaller one.
fn check(image: Vec<u8>, reencode: Option<Reencode>) -> Result<(&'static str, Vec<u8>), SampleError> {
    let pixels = decode(&image)?;
    match reencode {
        Some(Reencode { longest_side, quality }) if pixels.width.max(pixels.height) > longest_side as usize => {
            let smaller = fit(&pixels, longest_side as usize, Filter::Lanczos);
            Ok(("jpg", encode_jpeg(&smaller, quality)?))
        }
        _ => Ok((inspect(&image)?.0.extension(), image)),
    }
}
