//! `quarantine.jsonl`: what a run's shards hold that it cannot use, a line each.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::error::Error;

/// The file, to which nobody else adds.
pub(crate) struct Quarantine {
    path: PathBuf,
    /// Open from the first line on that is added.
    file: Option<File>,
    hashes: RandomState,
    /// Of the lines that it holds.
    known: HashSet<u64>,
}

impl Quarantine {
    /// Reads what the file holds, where there is one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open(path: PathBuf) -> Result<Quarantine, Error> {
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|error| Error::file(&path, error))?,
        };
        let hashes = RandomState::new();
        let known = text.lines().map(|line| hashes.hash_one(line)).collect();
        Ok(Quarantine { path, file: None, hashes, known })
    }

    /// Appends those that the file does not hold yet, as after a resumption from an earlier checkpoint, and returns a line about all of them.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append<T: Serialize + Display>(&mut self, found: &[T]) -> Result<Option<String>, Error> {
        let [first, ..] = found else { return Ok(None) };
        let mut new = String::new();
        for entry in found {
            let line = serde_json::to_string(entry).map_err(|error| Error::file(&self.path, error))?;
            if self.known.insert(self.hashes.hash_one(line.as_str())) {
                new += &line;
                new.push('\n');
            }
        }
        self.write(&new).map_err(|error| Error::file(&self.path, error))?;
        let (count, path) = (found.len(), self.path.display());
        Ok(Some(format!("{count} unreadable samples left out, the first: {first} (all: {path})")))
    }

    fn write(&mut self, lines: &str) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(OpenOptions::new().create(true).append(true).open(&self.path)?),
        };
        file.write_all(lines.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blip2_data::Quarantined;

    fn bad(index: u64) -> Quarantined {
        Quarantined { shard: "0.tar".into(), key: index.to_string(), index, reason: "grey".into() }
    }

    #[test]
    fn each_is_named_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("quarantine.jsonl");
        let mut quarantine = Quarantine::open(path.clone()).unwrap();
        assert_eq!(quarantine.append::<Quarantined>(&[]).unwrap(), None);
        assert!(!path.exists());
        let line = quarantine.append(&[bad(1), bad(2)]).unwrap().unwrap();
        assert!(line.starts_with("2 unreadable samples left out, the first: shard 0.tar, key 1: grey"), "{line}");
        quarantine.append(&[bad(2), bad(3), bad(3)]).unwrap();
        let written = fs::metadata(&path).unwrap().len();
        // By another start of the run, too.
        for mut quarantine in [quarantine, Quarantine::open(path.clone()).unwrap()] {
            quarantine.append(&[bad(3), bad(1)]).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), written);
        }
        let text = fs::read_to_string(&path).unwrap();
        let read: Vec<Quarantined> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, [bad(1), bad(2), bad(3)]);
    }

    /// The file may be long, and samples are found all the time.
    #[test]
    fn the_file_is_not_read_again_for_each_sample() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("quarantine.jsonl");
        let mut quarantine = Quarantine::open(path.clone()).unwrap();
        quarantine.append(&[bad(1)]).unwrap();
        fs::write(&path, "").unwrap();
        quarantine.append(&[bad(1), bad(2)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
    }
}
