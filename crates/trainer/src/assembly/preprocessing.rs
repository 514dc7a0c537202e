//! How pictures become a tower's pixels: what the `preprocessor_config.json` of its directory says, or the `image_processor` of its
//! `processor_config.json` (where `transformers` 5 writes it), else its family's defaults.
//!
//! The keys are those of `transformers`' image processors. Where the image is cropped in its centre behind the resize (CLIP, DINOv2), the
//! crop's size is the size of the pixels. Ours is BLIP-2's way for every tower: the whole image is squeezed into that square, with the
//! file's filter.

use std::path::{Path, PathBuf};

use blip2_data::Filter;
use blip2_model::vision::VisionConfig;
use blip2_weights::ImagePreprocessing;
use serde_json::{Map, Value};

use crate::config::AutoOr;
use crate::error::Error;

const FILE: &str = "preprocessor_config.json";
/// Where `transformers` 5 keeps the same below `image_processor`.
const NESTED_FILE: &str = "processor_config.json";
const NESTED_KEY: &str = "image_processor";
const FACTOR: f64 = 1.0 / 255.0;

/// From a decoded picture to the pixels that a tower takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessing {
    /// Side of the square in pixels.
    pub size: usize,
    /// How the picture is brought to it.
    pub filter: Filter,
    /// What a byte is multiplied by.
    pub rescale_factor: f64,
    /// Then subtracted, for red, green, blue.
    pub mean: [f64; 3],
    /// Then divided by.
    pub std: [f64; 3],
    /// The file that says so; `None` where the directory has none and the family's defaults hold.
    pub file: Option<&'static str>,
}

impl Preprocessing {
    /// What the directory `dir` of a tower or of a whole model asks for; `size` is the user's wish.
    ///
    /// # Errors
    /// A file that cannot be read, a value that cannot be: named with its key.
    pub fn of(dir: &Path, vision: &VisionConfig, size: &AutoOr<usize>) -> Result<Preprocessing, Error> {
        let file = File::read(dir)?;
        let defaults = vision.pixel_defaults();
        let native = file.size()?.unwrap_or(vision.image_size() as usize);
        let enabled = |key| file.flag(key).map(|flag| flag != Some(false));
        let (rescale, normalize) = (enabled("do_rescale")?, enabled("do_normalize")?);
        let factor = file.number("rescale_factor")?.unwrap_or(FACTOR);
        let mean = file.channels("image_mean")?.unwrap_or(defaults.mean);
        let std = file.channels("image_std")?.unwrap_or(defaults.std);
        if factor <= 0.0 {
            return Err(file.wrong("rescale_factor", "a number above 0", &factor.into()));
        }
        if let Some(zero) = std.iter().find(|std| **std <= 0.0) {
            return Err(file.wrong("image_std", "numbers above 0", &(*zero).into()));
        }
        Ok(Preprocessing {
            size: match size {
                AutoOr::Given(size) => *size,
                AutoOr::Auto => native,
            },
            filter: file.filter(u64::from(defaults.resample))?,
            rescale_factor: if rescale { factor } else { 1.0 },
            mean: if normalize { mean } else { [0.0; 3] },
            std: if normalize { std } else { [1.0; 3] },
            file: file.name,
        })
    }

    /// Which file says so, for people.
    pub fn origin(&self) -> String {
        match self.file {
            Some(file) => format!("pixels as {file} says"),
            None => format!("no {FILE}: pixels as its family is used to them, {} wide", self.size),
        }
    }

    /// As an export writes it.
    pub fn exported(&self) -> ImagePreprocessing {
        ImagePreprocessing {
            size: self.size as u32,
            resample: self.filter.pillow(),
            rescale_factor: self.rescale_factor,
            mean: self.mean,
            std: self.std,
        }
    }
}

/// The file's object; empty where there is no file.
struct File {
    path: PathBuf,
    name: Option<&'static str>,
    keys: Map<String, Value>,
}

impl File {
    fn read(dir: &Path) -> Result<File, Error> {
        let path = dir.join(FILE);
        if path.exists() {
            return Ok(File { keys: read_object(&path)?, path, name: Some(FILE) });
        }
        let nested = dir.join(NESTED_FILE);
        if nested.exists() {
            match read_object(&nested)?.remove(NESTED_KEY) {
                None | Some(Value::Null) => {}
                Some(Value::Object(keys)) => return Ok(File { path: nested, name: Some(NESTED_FILE), keys }),
                Some(other) => {
                    return Err(Error::file(&nested, format!("{NESTED_KEY}: expected an object, got {other}")));
                }
            }
        }
        Ok(File { path, name: None, keys: Map::new() })
    }

    /// A key's value; null is none.
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str, got: &Value) -> Error {
        Error::file(&self.path, format!("{key}: expected {expected}, got {got}"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        let flag = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value));
        self.get(key).map(flag).transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| self.wrong(key, "a number", value));
        self.get(key).map(number).transpose()
    }

    fn channels(&self, key: &str) -> Result<Option<[f64; 3]>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().map(|items| items.iter().map_while(Value::as_f64).collect::<Vec<_>>());
        match numbers.as_deref() {
            Some(&[red, green, blue]) if value.as_array().is_some_and(|items| items.len() == 3) => {
                Ok(Some([red, green, blue]))
            }
            _ => Err(self.wrong(key, "three numbers, for red, green, blue", value)),
        }
    }

    fn filter(&self, default: u64) -> Result<Filter, Error> {
        const EXPECTED: &str = "Pillow's number of a filter, 0 to 5 (2 bilinear, 3 bicubic)";
        let value = self.get("resample").cloned().unwrap_or_else(|| default.into());
        value.as_u64().and_then(Filter::from_pillow).ok_or_else(|| self.wrong("resample", EXPECTED, &value))
    }

    /// The side of the pixels: of the crop where there is one, else of what is resized.
    fn size(&self) -> Result<Option<usize>, Error> {
        let cropped = self.flag("do_center_crop")? == Some(true) && self.get("crop_size").is_some();
        let key = if cropped { "crop_size" } else { "size" };
        let Some(value) = self.get(key) else { return Ok(None) };
        let side = match value {
            Value::Object(sides) => match (sides.get("height"), sides.get("width")) {
                (Some(height), Some(width)) if height == width => Some(height),
                (None, None) => sides.get("shortest_edge"),
                _ => None,
            },
            number => Some(number),
        };
        match side.and_then(Value::as_u64) {
            Some(side) if (1..=4096).contains(&side) => Ok(Some(side as usize)),
            _ => Err(self.wrong(key, "one height and width of 1 to 4096 pixels", value)),
        }
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(other) => Err(Error::file(path, format!("expected an object, got {other}"))),
        Err(error) => Err(Error::file(path, format!("invalid JSON: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(model_type: &str, file: Option<Value>, size: AutoOr<usize>) -> Result<Preprocessing, String> {
        let dir = tempfile::tempdir().unwrap();
        if let Some(file) = file {
            std::fs::write(dir.path().join(FILE), file.to_string()).unwrap();
        }
        let vision = VisionConfig::from_json(&json!({"model_type": model_type})).unwrap();
        Preprocessing::of(dir.path(), &vision, &size).map_err(|error| error.to_string())
    }

    #[test]
    fn without_a_file_the_family_decides() {
        let siglip = of("siglip_vision_model", None, AutoOr::Auto).unwrap();
        let expected = Preprocessing {
            size: 224,
            filter: Filter::Bicubic,
            rescale_factor: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
            file: None,
        };
        assert_eq!(siglip, expected);
        assert_eq!(of("vit", None, AutoOr::Auto).unwrap().filter, Filter::Bilinear);
        let dino = of("dinov3_vit", None, AutoOr::Given(512)).unwrap();
        assert_eq!((dino.size, dino.filter, dino.mean), (512, Filter::Bilinear, [0.485, 0.456, 0.406]));
        assert_eq!(
            of("clip_vision_model", None, AutoOr::Auto).unwrap().std,
            [0.268_629_54, 0.261_302_58, 0.275_777_11]
        );
    }

    #[test]
    fn the_file_goes_before_the_family() {
        let file = json!({
            "do_center_crop": true, "crop_size": {"height": 256, "width": 256}, "size": {"shortest_edge": 288},
            "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 1, "rescale_factor": 0.5, "do_pad": null,
        });
        let read = of("dinov2", Some(file.clone()), AutoOr::Auto).unwrap();
        let expected = Preprocessing {
            size: 256,
            filter: Filter::Lanczos,
            rescale_factor: 0.5,
            mean: [0.1, 0.2, 0.3],
            std: [1.0, 2.0, 3.0],
            file: Some(FILE),
        };
        assert_eq!(read, expected);
        assert_eq!(of("dinov2", Some(file), AutoOr::Given(98)).unwrap().size, 98);
    }

    #[test]
    fn the_file_of_transformers_5_holds_where_the_older_one_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let vision = VisionConfig::from_json(&json!({"model_type": "vit"})).unwrap();
        let read = || Preprocessing::of(dir.path(), &vision, &AutoOr::Auto).map_err(|error| error.to_string());
        let write = |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        // An export's own has nothing of the pixels.
        write(NESTED_FILE, json!({"processor_class": "Blip2Processor", "num_query_tokens": 8}));
        assert_eq!(read().unwrap().file, None);
        assert!(read().unwrap().origin().starts_with("no preprocessor_config.json: "));
        write(
            NESTED_FILE,
            json!({"image_processor": {"size": {"height": 64, "width": 64}, "image_mean": [0.1, 0.2, 0.3]}}),
        );
        let nested = read().unwrap();
        assert_eq!((nested.size, nested.mean, nested.file), (64, [0.1, 0.2, 0.3], Some(NESTED_FILE)));
        write(NESTED_FILE, json!({"image_processor": {"image_std": [0, 1, 1]}}));
        assert!(read().unwrap_err().contains("processor_config.json: image_std: expected numbers above 0"));
        write(NESTED_FILE, json!({"image_processor": 7}));
        assert!(read().unwrap_err().ends_with("processor_config.json: image_processor: expected an object, got 7"));
        write(FILE, json!({"size": 32}));
        assert_eq!((read().unwrap().size, read().unwrap().file), (32, Some(FILE)));
    }

    #[test]
    fn sizes_as_files_of_any_age_write_them() {
        for (file, size) in [
            (json!({"size": 384}), 384),
            (json!({"size": {"height": 378, "width": 378}}), 378),
            (json!({"size": {"shortest_edge": 336}, "crop_size": 224}), 336),
            (json!({"size": 256, "crop_size": 224, "do_center_crop": true}), 224),
            (json!({"size": {"height": 240, "width": 240}, "crop_size": null, "do_center_crop": true}), 240),
        ] {
            assert_eq!(of("vit", Some(file.clone()), AutoOr::Auto).unwrap().size, size, "{file}");
        }
    }

    #[test]
    fn steps_that_are_switched_off_change_nothing() {
        let read = of("vit", Some(json!({"do_rescale": false, "do_normalize": false})), AutoOr::Auto).unwrap();
        assert_eq!((read.rescale_factor, read.mean, read.std), (1.0, [0.0; 3], [1.0; 3]));
    }

    #[test]
    fn a_number_that_cannot_be_is_named_by_file_and_key() {
        for (file, expected) in [
            (
                json!({"image_mean": [0.5, 0.5]}),
                "image_mean: expected three numbers, for red, green, blue, got [0.5,0.5]",
            ),
            (json!({"image_mean": [0.5, "x", 0.5]}), "image_mean: expected three numbers"),
            (json!({"image_std": [0.5, 0.5, 0]}), "image_std: expected numbers above 0, got 0.0"),
            (json!({"image_std": 1}), "image_std: expected three numbers, for red, green, blue, got 1"),
            (json!({"resample": 6}), "resample: expected Pillow's number of a filter, 0 to 5"),
            (json!({"resample": "bicubic"}), "(2 bilinear, 3 bicubic), got \"bicubic\""),
            (json!({"rescale_factor": 0}), "rescale_factor: expected a number above 0, got 0.0"),
            (json!({"rescale_factor": "1/255"}), "rescale_factor: expected a number, got \"1/255\""),
            (json!({"do_rescale": 1}), "do_rescale: expected true or false, got 1"),
            (json!({"size": {"height": 224, "width": 336}}), "size: expected one height and width of 1 to 4096 pixels"),
            (json!({"size": 0}), "size: expected one height and width of 1 to 4096 pixels, got 0"),
            (json!({"size": -1, "crop_size": 2}), "size: expected one height and width"),
            (json!([1]), "expected an object, got [1]"),
        ] {
            let message = of("vit", Some(file), AutoOr::Given(224)).unwrap_err();
            assert!(message.contains(FILE) && message.contains(expected) && message.lines().count() == 1, "{message}");
        }
    }
}
