//! A folder that is packed into, so that a killed packing goes on: its shards, `pack.json` and `left_out.jsonl`.
//!
//! A shard is written beside its place and synced; its rows that were left out are appended and synced; `pack.json` takes
//! it up; then it gets its name. So every shard with a name is in `pack.json`, and only the last one there may lack its
//! file: it is packed again.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ledger::{Ledger, Line, Shard, shard_name};
use super::left_out::{LeftOut, LeftOutRows};
use super::source::Input;
use super::{RowProblem, Written};
use crate::atomic::{self, Staged};
use crate::{DataError, IndexedShard};

const LEDGER: &str = "pack.json";
const LEFT_OUT: &str = "left_out.jsonl";

/// The folder that is packed into, which no other process packs into meanwhile.
pub(crate) struct Folder {
    path: PathBuf,
    /// Whether it was not there before.
    made: bool,
    _lock: File,
    ledger: Ledger,
    /// Whether `pack.json` holds it, line by line.
    written: bool,
}

impl Folder {
    /// Makes the folder or takes up what lies in it.
    pub(crate) fn open(path: &Path, options: Map<String, Value>, inputs: Vec<Input>) -> Result<Folder, DataError> {
        let made = !path.exists();
        fs::create_dir_all(path).map_err(DataError::io(path))?;
        let lock = File::open(path).map_err(DataError::io(path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataError::PackLocked { folder: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(DataError::io(path)(error)),
        }
        let ledger = Ledger::new(options, inputs);
        let mut folder = Folder { path: path.to_owned(), made, _lock: lock, ledger, written: false };
        let found = Ledger::read(&folder.path.join(LEDGER))?;
        let is_there = found.is_some();
        if let Some((found, written)) = found {
            let differences = folder.ledger.differences(&found);
            if !differences.is_empty() {
                return Err(DataError::OtherPacking { path: folder.path.join(LEDGER), differences });
            }
            (folder.ledger, folder.written) = (found, written);
        }
        folder.refuse_foreign_shards()?;
        folder.take_up()?;
        if is_there && !folder.written {
            folder.write_ledger()?;
        }
        Ok(folder)
    }

    /// Shards of unknown origin are never touched.
    fn refuse_foreign_shards(&self) -> Result<(), DataError> {
        let known: HashSet<&str> = self.ledger.shards.iter().map(|shard| shard.name.as_str()).collect();
        let own = |name: &str| known.contains(name.strip_suffix(".idx").unwrap_or(name));
        let mut foreign = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(DataError::io(&self.path))? {
            let path = entry.map_err(DataError::io(&self.path))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(atomic::UNFINISHED) {
                // A killed packing's: the lock says that nobody writes it any more.
                fs::remove_file(&path).map_err(DataError::io(&path))?;
            } else if (name.ends_with(".tar") || name.ends_with(".idx")) && !own(&name) {
                foreign.push(path);
            }
        }
        foreign.sort();
        foreign.into_iter().next().map_or(Ok(()), |path| Err(DataError::WouldOverwrite { path }))
    }

    /// Drops a last shard that has not got its name, and what was written behind the last whole one.
    fn take_up(&mut self) -> Result<(), DataError> {
        let last = self.ledger.shards.len();
        for at in 0..last {
            let shard = &self.ledger.shards[at];
            let path = self.path.join(&shard.name);
            let damaged = |reason: String| DataError::PackDamaged { path: path.clone(), reason };
            match fs::metadata(&path) {
                Ok(metadata) if metadata.len() == shard.bytes => {
                    IndexedShard::open(&path, None)?;
                }
                Ok(metadata) => {
                    return Err(damaged(format!("has {} bytes, {LEDGER} says {}", metadata.len(), shard.bytes)));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(DataError::io(&path)(error)),
                Err(_) if at + 1 == last && self.ledger.complete.is_none() => {
                    self.ledger.shards.pop();
                    self.written = false;
                }
                Err(_) => return Err(damaged(format!("is gone, {LEDGER} names it"))),
            }
        }
        let LeftOut { bytes, .. } = self.left_out_state();
        let path = self.path.join(LEFT_OUT);
        let there = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        match there.cmp(&bytes) {
            std::cmp::Ordering::Less => {
                Err(DataError::PackDamaged { path, reason: format!("has {there} bytes, {LEDGER} says {bytes}") })
            }
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater if bytes == 0 => fs::remove_file(&path).map_err(DataError::io(&path)),
            std::cmp::Ordering::Greater => {
                let cut = || {
                    let file = OpenOptions::new().write(true).open(&path)?;
                    file.set_len(bytes)?;
                    file.sync_all()
                };
                cut().map_err(DataError::io(&path))
            }
        }
    }

    fn left_out_state(&self) -> LeftOut {
        let last = self.ledger.shards.last().map(|shard| shard.left_out);
        self.ledger.complete.or(last).unwrap_or_default()
    }

    /// Whether every row has been packed.
    pub(crate) fn is_complete(&self) -> bool {
        self.ledger.complete.is_some()
    }

    /// The first row that no shard has.
    pub(crate) fn next_row(&self) -> u64 {
        self.ledger.shards.last().map_or(0, |shard| shard.rows.1)
    }

    /// Where the next shard goes.
    pub(crate) fn next_shard(&self) -> PathBuf {
        self.path.join(shard_name(self.ledger.shards.len()))
    }

    /// The shards that are there.
    pub(crate) fn shards(&self) -> Vec<PathBuf> {
        self.ledger.shards.iter().map(|shard| self.path.join(&shard.name)).collect()
    }

    /// Samples in them.
    pub(crate) fn samples(&self) -> u64 {
        self.ledger.shards.iter().map(|shard| shard.samples).sum()
    }

    /// Rows that were left out.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out_state().rows
    }

    /// Gives a shard its name, with the rows up to `end` and those of them that were left out.
    pub(crate) fn take(
        &mut self,
        staged: Staged,
        written: Written,
        end: u64,
        left_out: &mut LeftOutRows,
    ) -> Result<(), DataError> {
        let path = self.next_shard();
        let left_out = left_out.sync()?;
        let shard = Shard {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: staged.bytes().map_err(DataError::io(&path))?,
            samples: written.samples,
            rows: (self.next_row(), end),
            left_out,
        };
        self.ledger.shards.push(shard.clone());
        self.add_line(Line::Shard(shard))?;
        staged.create().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DataError::WouldOverwrite { path: path.clone() },
            _ => DataError::io(&path)(error),
        })?;
        IndexedShard::of_written(&path, written.digest).map(|_| ())
    }

    /// Says that every row has been packed.
    pub(crate) fn complete(&mut self, left_out: &mut LeftOutRows) -> Result<(), DataError> {
        let complete = left_out.sync()?;
        self.ledger.complete = Some(complete);
        self.add_line(Line::Complete { complete })
    }

    /// Leaves nothing behind where no shard came about.
    pub(crate) fn abandon(self) {
        if self.ledger.shards.is_empty() {
            // What cannot be removed is no shard, and the next start removes or takes it.
            let _ = fs::remove_file(self.path.join(LEFT_OUT));
            let _ = fs::remove_file(self.path.join(LEDGER));
            let _ = if self.made { fs::remove_dir(&self.path) } else { Ok(()) };
        }
    }

    /// Takes up the list of rows that are left out.
    pub(crate) fn left_out_rows(&self) -> LeftOutRows {
        LeftOutRows::behind(self.path.join(LEFT_OUT), self.left_out_state())
    }

    /// The first rows that were left out, at most `count`.
    pub(crate) fn first_left_out(&self, count: usize) -> Result<Vec<RowProblem>, DataError> {
        if self.left_out() == 0 {
            return Ok(Vec::new());
        }
        let path = self.path.join(LEFT_OUT);
        let lines = BufReader::new(File::open(&path).map_err(DataError::io(&path))?).lines().take(count);
        lines
            .map(|line| serde_json::from_str(&line?).map_err(io::Error::from))
            .collect::<io::Result<_>>()
            .map_err(DataError::io(&path))
    }

    /// Adds the ledger's last line to `pack.json`.
    fn add_line(&mut self, line: Line) -> Result<(), DataError> {
        match self.written {
            true => line.append(&self.path.join(LEDGER)),
            false => self.write_ledger(),
        }
    }

    fn write_ledger(&mut self) -> Result<(), DataError> {
        self.written = true;
        self.ledger.write(&self.path.join(LEDGER))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::Digest;
    use crate::fixture::{png, tar};

    fn inputs() -> Vec<Input> {
        (0..100).map(|n| Input { name: format!("part-{n}.jsonl"), size: n, mtime_ns: Some(n) }).collect()
    }

    fn open(path: &Path) -> Folder {
        Folder::open(path, Map::new(), inputs()).unwrap()
    }

    /// Packs one more shard, of one row.
    fn add_shard(folder: &mut Folder) {
        let bytes = tar(&[("a.png", &png(3, 3, 1)), ("a.txt", b"text")]);
        let (staged, ()) = atomic::stage(&folder.next_shard(), |out| out.write_all(&bytes)).unwrap();
        let written = Written { samples: 1, digest: Digest::of(&bytes) };
        let (end, mut left_out) = (folder.next_row() + 1, folder.left_out_rows());
        folder.take(staged, written, end, &mut left_out).unwrap();
    }

    #[test]
    fn a_shard_adds_a_line_and_writes_nothing_again() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(LEDGER);
        let mut folder = open(place.path());
        add_shard(&mut folder);
        let first = fs::metadata(&path).unwrap();
        for number in 1..8 {
            let before = fs::metadata(&path).unwrap().len();
            add_shard(&mut folder);
            let after = fs::metadata(&path).unwrap();
            assert!(after.len() - before < 160, "{} bytes for shard {number}", after.len() - before);
            // Appended to, not replaced.
            assert_eq!(after.ino(), first.ino());
        }
        let mut left_out = folder.left_out_rows();
        folder.complete(&mut left_out).unwrap();
        drop(folder);
        let folder = open(place.path());
        assert!(folder.is_complete());
        assert_eq!((folder.shards().len(), folder.next_row()), (8, 8));
        assert_eq!(fs::metadata(&path).unwrap().ino(), first.ino());
    }

    #[test]
    fn a_line_that_was_cut_is_dropped_and_any_other_damage_told_of() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(LEDGER);
        let mut folder = open(place.path());
        (0..3).for_each(|_| add_shard(&mut folder));
        drop(folder);
        let whole = fs::read(&path).unwrap();
        let last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
        let line = whole[last..].to_vec();
        // A fourth shard's line, cut anywhere: the shard has no name by then.
        for length in 1..line.len() {
            fs::write(&path, [&whole[..], &line[..length]].concat()).unwrap();
            assert_eq!(open(place.path()).shards().len(), 3);
            assert!(fs::read(&path).unwrap() == whole, "{length} bytes");
        }
        // Blocks that never reached the disk.
        fs::write(&path, [&whole[..], &[0; 90]].concat()).unwrap();
        let mut folder = open(place.path());
        add_shard(&mut folder);
        drop(folder);
        let longer = fs::read(&path).unwrap();
        assert!(longer.starts_with(&whole) && longer.len() - whole.len() == line.len());
        // In the middle, or behind the end, nobody has been killed.
        let complete = b"{\"complete\":{\"rows\":0,\"bytes\":0}}\n";
        for damaged in [[&whole[..], b"{\n", &line].concat(), [&longer[..], complete, b"{"].concat()] {
            fs::write(&path, damaged).unwrap();
            let error = Folder::open(place.path(), Map::new(), inputs()).err().unwrap().to_string();
            assert!(error.contains("its line ") && error.contains("pack again"), "{error}");
        }
    }

    #[test]
    fn shards_that_do_not_follow_each_other_are_not_gone_on_from() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(LEDGER);
        let mut folder = open(place.path());
        (0..3).for_each(|_| add_shard(&mut folder));
        drop(folder);
        let whole = fs::read_to_string(&path).unwrap();
        for (was, is) in [
            ("\"samples\":1", "\"samples\":18446744073709551615"),
            ("\"rows\":[1,2]", "\"rows\":[2,3]"),
            ("\"rows\":[1,2]", "\"rows\":[1,1]"),
            ("00001.tar", "../../1.tar"),
        ] {
            let forged = whole.replace(was, is);
            assert_ne!(forged, whole, "{was}");
            fs::write(&path, forged).unwrap();
            let error = Folder::open(place.path(), Map::new(), inputs()).err().unwrap().to_string();
            assert!(error.contains("does not go on behind row ") && error.contains("pack again"), "{error}");
        }
    }

    #[test]
    fn a_ledger_of_one_line_is_gone_on_from() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(LEDGER);
        let mut folder = open(place.path());
        (0..2).for_each(|_| add_shard(&mut folder));
        let mut old = serde_json::json!(folder.ledger);
        old["version"] = 1.into();
        // Nor does it say when inputs were modified.
        for input in old["inputs"].as_array_mut().unwrap() {
            input.as_object_mut().unwrap().remove("mtime_ns").unwrap();
        }
        old["shards"] = serde_json::json!(folder.ledger.shards);
        drop(folder);
        let lines = fs::read(&path).unwrap();
        fs::write(&path, format!("{old}\n")).unwrap();
        let mut folder = open(place.path());
        assert_eq!(folder.shards().len(), 2);
        let shards_of =
            |bytes: &[u8]| bytes.split(|&byte| byte == b'\n').skip(1).map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(shards_of(&fs::read(&path).unwrap()), shards_of(&lines));
        add_shard(&mut folder);
        assert_eq!(folder.shards().len(), 3);
    }
}
