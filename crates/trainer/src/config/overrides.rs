//! `--set key.path=value` on a document before it is read.

use super::error::{ConfigError, Problem};
use super::node::Node;

/// One `--set` argument that was applied.
pub(super) struct Override {
    text: String,
    path: Vec<String>,
    /// How many leading parts of the path the file had.
    existing: usize,
}

impl Override {
    /// The argument as the user wrote it.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The path from which on what stands in the document comes from this argument.
    pub(super) fn introduced(&self) -> &[String] {
        &self.path[..self.path.len().min(self.existing + 1)]
    }
}

/// Puts the value of `argument` (`a.b.c=value`, the value as YAML, list entries by index) into `document`.
///
/// Sections on the way are made where they are missing; whether the keys exist at all is for the reader to say.
pub(super) fn apply(document: &mut Node, argument: &str) -> Result<Override, ConfigError> {
    let wrong = |key: &str, expected: &str, got: String, hint: Option<&str>| ConfigError {
        origin: format!("--set {argument}"),
        key: key.to_string(),
        problem: Problem::Unexpected { expected: expected.to_string(), got, hint: hint.map(str::to_string) },
    };
    let Some((key, value)) = argument.split_once('=') else {
        return Err(wrong("", "key.path=value", format!("{argument:?}"), Some("there is no = in it")));
    };
    let path: Vec<String> = key.split('.').map(|part| part.trim().to_string()).collect();
    if path.iter().any(String::is_empty) {
        return Err(wrong(key, "a dotted path of keys", format!("{key:?}"), Some("as in optimizer.lr=1e-4")));
    }
    let value = Node::parse(value).map_err(|error| wrong(key, "a YAML value", error.to_string(), None))?;

    let mut existing = 0;
    let mut node = document;
    for (depth, part) in path.iter().enumerate() {
        let here = node;
        if let Node::List(items) = here {
            let length = items.len();
            node = part.parse().ok().and_then(|index: usize| items.get_mut(index)).ok_or_else(|| {
                let expected = format!("the index of one of {length} entries, from 0");
                wrong(&path[..=depth].join("."), &expected, format!("{part:?}"), Some("or set the list as a whole"))
            })?;
            existing = depth + 1;
            continue;
        }
        if !matches!(here, Node::Map(_)) {
            *here = Node::Map(Vec::new());
            // What stood at the part before is gone: from there on it is this argument's.
            existing = existing.min(depth.saturating_sub(1));
        }
        let Node::Map(entries) = here else { unreachable!("made a mapping above") };
        let position = match entries.iter().rposition(|(name, _)| name == part) {
            Some(position) => {
                existing = depth + 1;
                position
            }
            None => {
                entries.push((part.clone(), Node::Null));
                entries.len() - 1
            }
        };
        node = &mut entries[position].1;
    }
    *node = value;
    Ok(Override { text: argument.to_string(), path, existing })
}
