//! Frozen towers that an export of trained weights alone names instead of holding them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::directory::Part;
use crate::error::WeightsError;
use crate::json_file::{describe, read_object};

/// The key of `config.json` under which such an export names its towers.
pub(crate) const FROZEN_KEY: &str = "frozen_weights";

/// Where a directory of trained weights alone finds one of its frozen towers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrozenElsewhere {
    /// The tower.
    pub part: Part,
    /// What it was trained with: a folder or a hub id.
    pub source: String,
    /// Its folder; relative paths start at the directory.
    pub path: PathBuf,
    /// BLAKE3 of its weights.
    pub digest: String,
}

impl FrozenElsewhere {
    /// What the `config.json` of `directory` names so; nothing where there is none that can be read, which opening the directory will say.
    pub fn named_by(directory: &Path) -> Vec<FrozenElsewhere> {
        let config = read_object(&directory.join("config.json"));
        config.and_then(|config| frozen_elsewhere(directory, &config)).unwrap_or_default()
    }
}

/// Reads `frozen_weights`: `{"vision": {"source": .., "path": .., "digest": ..}, "language": ..}`.
pub(crate) fn frozen_elsewhere(directory: &Path, config: &Value) -> Result<Vec<FrozenElsewhere>, WeightsError> {
    let mut found = Vec::new();
    for part in [Part::Vision, Part::Language] {
        let Some(entry) = config.get(FROZEN_KEY).and_then(|frozen| frozen.get(part.key())) else { continue };
        let text = |key: &str| {
            entry.get(key).and_then(Value::as_str).map(str::to_string).ok_or_else(|| WeightsError::Key {
                path: directory.join("config.json"),
                key: format!("{FROZEN_KEY}.{}.{key}", part.key()),
                expected: "a text".into(),
                got: describe(entry.get(key)),
            })
        };
        let path = directory.join(text("path")?);
        found.push(FrozenElsewhere { part, source: text("source")?, path, digest: text("digest")? });
    }
    Ok(found)
}
