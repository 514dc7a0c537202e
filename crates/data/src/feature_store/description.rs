//! What the features of a folder are. Everything that decides about their values is here, and the folder is named after its digest.

use serde::{Deserialize, Serialize};

use crate::image::{JpegSize, PIXELS_VERSION};
use crate::{Augment, Filter};

const FORMAT: &str = "blip2-feature-cache";
const VERSION: u32 = 1;
/// The longest payload that is believed.
pub(super) const MAX_ROW_BYTES: u64 = 1 << 30;
/// Hexadecimal digits of a digest in a name.
pub(super) const NAME_DIGITS: usize = 16;

/// How a token's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureFormat {
    /// bfloat16, `[tokens, width]`.
    Bf16,
    /// Whole numbers from -127 to 127, `[tokens, width]`, behind an f32 scale a token, `[tokens]`: half the size.
    Int8,
}

impl FeatureFormat {
    /// Every format.
    pub const ALL: [FeatureFormat; 2] = [FeatureFormat::Bf16, FeatureFormat::Int8];

    /// The word for it in files.
    pub fn as_str(self) -> &'static str {
        match self {
            FeatureFormat::Bf16 => "bf16",
            FeatureFormat::Int8 => "int8",
        }
    }
}

/// The frozen image encoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderIdentity {
    /// Digest of its architecture and of the weights that it computes with.
    pub weights: String,
    /// Which hidden state its features are.
    pub layer: i64,
    /// Number format of its weights and matrix products.
    pub dtype: String,
}

/// From a decoded image to what the encoder takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageSteps {
    /// Side of the square in pixels.
    pub size: usize,
    /// Pillow's number of the filter.
    pub resample: u8,
    /// What a byte is multiplied by.
    pub rescale_factor: f64,
    /// Then subtracted, for red, green, blue.
    pub mean: [f64; 3],
    /// Then divided by.
    pub std: [f64; 3],
    /// How the views of an image are varied, as [`Augment::as_str`] says it.
    pub augment: String,
    /// The size at which JPEGs are decoded, as [`JpegSize::as_str`] says it; whole ones are not said.
    #[serde(default = "whole", skip_serializing_if = "is_whole")]
    pub jpegs: String,
    /// Version of the code that makes pixels.
    pub pixels_version: u32,
}

impl ImageSteps {
    /// The steps of this program.
    pub fn new(
        size: usize,
        filter: Filter,
        rescale_factor: f64,
        mean: [f64; 3],
        std: [f64; 3],
        augment: Augment,
        jpegs: JpegSize,
    ) -> ImageSteps {
        let (resample, augment, jpegs) = (filter.pillow(), augment.as_str().to_owned(), jpegs.as_str().to_owned());
        ImageSteps { size, resample, rescale_factor, mean, std, augment, jpegs, pixels_version: PIXELS_VERSION }
    }
}

fn whole() -> String {
    JpegSize::Full.as_str().to_owned()
}

fn is_whole(jpegs: &str) -> bool {
    jpegs == JpegSize::Full.as_str()
}

/// What a row holds and of what it is a function, besides the image and the number of the view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The encoder.
    pub encoder: EncoderIdentity,
    /// What is done to an image before it.
    pub image: ImageSteps,
    /// Feature tokens of an image.
    pub tokens: usize,
    /// Numbers a token.
    pub width: usize,
    /// How they are stored.
    pub stored_as: FeatureFormat,
}

/// The description as its file holds it.
#[derive(Serialize, Deserialize)]
struct DescriptionFile {
    format: String,
    version: u32,
    #[serde(flatten)]
    description: Description,
}

impl Description {
    /// Length of a row's payload.
    pub fn row_bytes(&self) -> usize {
        self.counted_row_bytes().unwrap_or(usize::MAX)
    }

    /// The same, as far as it can be counted.
    fn counted_row_bytes(&self) -> Option<usize> {
        match self.stored_as {
            FeatureFormat::Bf16 => self.tokens.checked_mul(self.width)?.checked_mul(2),
            FeatureFormat::Int8 => self.tokens.checked_mul(self.width.checked_add(4)?),
        }
    }

    /// The name of its folder.
    pub fn key(&self) -> String {
        let mut key = blake3::hash(self.to_file().as_bytes()).to_hex().to_string();
        key.truncate(NAME_DIGITS);
        key
    }

    pub(super) fn to_file(&self) -> String {
        let file = DescriptionFile { format: FORMAT.to_owned(), version: VERSION, description: self.clone() };
        format!("{:#}\n", serde_json::json!(file))
    }

    /// The description in a file's bytes; `None` where it is none of this format, or of rows that are too long.
    pub(super) fn from_file(bytes: &[u8]) -> Option<Description> {
        let DescriptionFile { format, version, description } = serde_json::from_slice(bytes).ok()?;
        let row_bytes = description.counted_row_bytes()? as u64;
        (format == FORMAT && version == VERSION && row_bytes <= MAX_ROW_BYTES).then_some(description)
    }
}

#[cfg(test)]
pub(super) fn example() -> Description {
    Description {
        encoder: EncoderIdentity { weights: "abc".into(), layer: 2, dtype: "bf16".into() },
        image: ImageSteps::new(
            8,
            Filter::Bicubic,
            1.0 / 255.0,
            [0.1, 0.2, 0.3],
            [0.5; 3],
            Augment::CropFlip,
            JpegSize::Full,
        ),
        tokens: 3,
        width: 4,
        stored_as: FeatureFormat::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_decides_about_values_decides_about_the_key() {
        let changes: [fn(&mut Description); 14] = [
            |d| d.encoder.weights = "abd".into(),
            |d| d.encoder.layer = 1,
            |d| d.encoder.dtype = "fp32".into(),
            |d| d.image.size = 9,
            |d| d.image.resample = 2,
            |d| d.image.rescale_factor = 1.0,
            |d| d.image.mean[2] = f64::from_bits(0.3f64.to_bits() + 1),
            |d| d.image.std[0] = 0.25,
            |d| d.image.augment = "none".into(),
            |d| d.image.jpegs = "reduced".into(),
            |d| d.image.pixels_version += 1,
            |d| d.tokens = 4,
            |d| d.width = 5,
            |d| d.stored_as = FeatureFormat::Int8,
        ];
        let mut keys = vec![example().key()];
        for change in changes {
            let mut changed = example();
            change(&mut changed);
            keys.push(changed.key());
        }
        assert!(keys.iter().all(|key| key.len() == NAME_DIGITS));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn a_description_is_read_back_from_its_file() {
        assert_eq!(Description::from_file(example().to_file().as_bytes()), Some(example()));
        assert_eq!(Description::from_file(b"{}"), None);
    }

    #[test]
    fn rows_that_no_memory_has_room_for_are_not_believed() {
        for stored_as in [FeatureFormat::Bf16, FeatureFormat::Int8] {
            for (tokens, width) in [(1 << 20, 1 << 20), (usize::MAX, 2), (2, usize::MAX), (usize::MAX, usize::MAX)] {
                let file = Description { tokens, width, stored_as, ..example() }.to_file();
                assert_eq!(Description::from_file(file.as_bytes()), None, "{tokens} x {width}");
            }
        }
    }

    #[test]
    fn a_row_is_as_long_as_its_numbers() {
        let int8 = Description { stored_as: FeatureFormat::Int8, ..example() };
        assert_eq!((example().row_bytes(), int8.row_bytes()), (24, 24));
    }
}
