//! `quarantine.jsonl`: what a run's shards hold that it cannot use, a line each.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::error::Error;

/// Appends those that the file does not hold yet, as after a resumption from an earlier checkpoint, and returns a line about all of them.
///
/// # Errors
/// The file cannot be read or written.
pub(crate) fn append<T: Serialize + Display>(path: &Path, found: &[T]) -> Result<Option<String>, Error> {
    let [first, ..] = found else { return Ok(None) };
    let known = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::file(path, error)),
    };
    let lines: Vec<String> =
        found.iter().map(serde_json::to_string).collect::<Result<_, _>>().map_err(|e| Error::file(path, e))?;
    let mut seen: HashSet<&str> = known.lines().collect();
    let mut new = String::new();
    for line in lines.iter().filter(|line| seen.insert(line)) {
        new += line;
        new.push('\n');
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::file(path, e))?;
    file.write_all(new.as_bytes()).map_err(|e| Error::file(path, e))?;
    Ok(Some(format!("{} unreadable samples left out, the first: {first} (all: {})", found.len(), path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use blip2_data::Quarantined;

    #[test]
    fn each_is_named_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("quarantine.jsonl");
        let bad =
            |index: u64| Quarantined { shard: "0.tar".into(), key: index.to_string(), index, reason: "grey".into() };
        assert_eq!(append::<Quarantined>(&path, &[]).unwrap(), None);
        assert!(!path.exists());
        let line = append(&path, &[bad(1), bad(2)]).unwrap().unwrap();
        assert!(line.starts_with("2 unreadable samples left out, the first: shard 0.tar, key 1: grey"), "{line}");
        append(&path, &[bad(2), bad(3), bad(3)]).unwrap();
        let written = fs::metadata(&path).unwrap().len();
        append(&path, &[bad(3), bad(1)]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), written);
        let text = fs::read_to_string(&path).unwrap();
        let read: Vec<Quarantined> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, [bad(1), bad(2), bad(3)]);
    }
}
