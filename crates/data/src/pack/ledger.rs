//! What a folder of shards knows of its packing, so that a killed one goes on: `pack.json` says of what the shards are
//! and which rows went into each, `left_out.jsonl` which rows did not and why.
//!
//! A shard is written beside its place and synced; its rows that were left out are appended and synced; `pack.json` takes
//! it up; then it gets its name. So every shard with a name is in `pack.json`, and only the last one there may lack its
//! file: it is packed again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::RowProblem;
use super::source::Input;
use crate::atomic::{self, Staged};
use crate::{DataError, IndexedShard};

const LEDGER: &str = "pack.json";
const LEFT_OUT: &str = "left_out.jsonl";
const FORMAT: &str = "blip2-pack";
const VERSION: u32 = 1;

/// The contents of `pack.json`.
#[derive(Clone, Serialize, Deserialize)]
struct Ledger {
    format: String,
    version: u32,
    options: Map<String, Value>,
    inputs: Vec<Input>,
    shards: Vec<Shard>,
    /// Rows that were left out in all; there once every row has been packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    complete: Option<LeftOut>,
}

/// A shard and the rows that it is made of.
#[derive(Clone, Serialize, Deserialize)]
struct Shard {
    name: String,
    bytes: u64,
    samples: u64,
    /// First row, counted from 0, and the one behind the last.
    rows: (u64, u64),
    left_out: LeftOut,
}

/// The state of `left_out.jsonl`.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct LeftOut {
    rows: u64,
    bytes: u64,
}

/// The folder that is packed into, which no other process packs into meanwhile.
pub(crate) struct Folder {
    path: PathBuf,
    /// Whether it was not there before.
    made: bool,
    _lock: File,
    ledger: Ledger,
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
        let new =
            Ledger { format: FORMAT.to_owned(), version: VERSION, options, inputs, shards: Vec::new(), complete: None };
        let mut folder = Folder { path: path.to_owned(), made, _lock: lock, ledger: new };
        if let Some(found) = folder.read_ledger()? {
            let differences = folder.ledger.differences(&found);
            if !differences.is_empty() {
                return Err(DataError::OtherPacking { path: folder.path.join(LEDGER), differences });
            }
            folder.ledger = found;
        }
        folder.refuse_foreign_shards()?;
        folder.take_up()?;
        Ok(folder)
    }

    fn read_ledger(&self) -> Result<Option<Ledger>, DataError> {
        let path = self.path.join(LEDGER);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(DataError::io(&path))?,
        };
        let damaged = |reason: String| DataError::PackDamaged { path: path.clone(), reason };
        let ledger: Ledger = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        match (ledger.format.as_str(), ledger.version) {
            (FORMAT, VERSION) => Ok(Some(ledger)),
            (format, version) => Err(damaged(format!("is {format} version {version}, not {FORMAT} version {VERSION}"))),
        }
    }

    /// Shards of unknown origin are never touched.
    fn refuse_foreign_shards(&self) -> Result<(), DataError> {
        let own = |name: &str| {
            let name = name.strip_suffix(".idx").unwrap_or(name);
            self.ledger.shards.iter().any(|shard| shard.name == name)
        };
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
        self.path.join(format!("{:05}.tar", self.ledger.shards.len()))
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
        samples: u64,
        end: u64,
        left_out: &mut LeftOutRows,
    ) -> Result<(), DataError> {
        let path = self.next_shard();
        let left_out = left_out.sync()?;
        let shard = Shard {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: staged.bytes().map_err(DataError::io(&path))?,
            samples,
            rows: (self.next_row(), end),
            left_out,
        };
        self.ledger.shards.push(shard);
        self.write_ledger()?;
        staged.create().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DataError::WouldOverwrite { path: path.clone() },
            _ => DataError::io(&path)(error),
        })?;
        IndexedShard::rebuild(&path, None).map(|_| ())
    }

    /// Says that every row has been packed.
    pub(crate) fn complete(&mut self, left_out: &mut LeftOutRows) -> Result<(), DataError> {
        self.ledger.complete = Some(left_out.sync()?);
        self.write_ledger()
    }

    /// Leaves nothing behind where no shard came about.
    pub(crate) fn abandon(self) {
        if self.ledger.shards.is_empty() {
            // What cannot be removed is no shard, and the next start removes or takes it.
            let _ = fs::remove_file(self.path.join(LEFT_OUT));
            let _ = if self.made { fs::remove_dir(&self.path) } else { Ok(()) };
        }
    }

    /// Takes up the list of rows that are left out.
    pub(crate) fn left_out_rows(&self) -> LeftOutRows {
        LeftOutRows { path: self.path.join(LEFT_OUT), file: None, state: self.left_out_state(), first: None }
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

    fn write_ledger(&self) -> Result<(), DataError> {
        let path = self.path.join(LEDGER);
        let text = serde_json::json!(self.ledger).to_string();
        atomic::write(&path, |out| writeln!(out, "{text}")).map_err(DataError::io(&path))
    }
}

/// `left_out.jsonl`, open at its end. What is behind the state in `pack.json` is cut off when a packing is taken up.
pub(crate) struct LeftOutRows {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    state: LeftOut,
    first: Option<RowProblem>,
}

impl LeftOutRows {
    pub(crate) fn push(&mut self, problem: RowProblem) -> Result<(), DataError> {
        let line = format!("{}\n", serde_json::json!(problem));
        self.write(&line).map_err(DataError::io(&self.path))?;
        self.state.rows += 1;
        self.state.bytes += line.len() as u64;
        self.first.get_or_insert(problem);
        Ok(())
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().create(true).append(true).open(&self.path)?;
                self.file.insert(BufWriter::new(file))
            }
        };
        file.write_all(line.as_bytes())
    }

    /// The first row that was left out since the start.
    pub(crate) fn first(&self) -> Option<&RowProblem> {
        self.first.as_ref()
    }

    fn sync(&mut self) -> Result<LeftOut, DataError> {
        if let Some(file) = &mut self.file {
            let synced = file.flush().and_then(|()| file.get_ref().sync_all());
            synced.map_err(DataError::io(&self.path))?;
        }
        Ok(self.state)
    }
}

impl Ledger {
    /// What another packing's options and inputs have that these have not, and the other way round.
    fn differences(&self, there: &Ledger) -> Vec<String> {
        let mut differences = Vec::new();
        let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        let mut names: Vec<&String> = self.options.keys().chain(there.options.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let (was, is) = (there.options.get(name), self.options.get(name));
            if was != is {
                differences.push(format!("{name}: {} there, {} now", show(was), show(is)));
            }
        }
        if there.inputs.len() != self.inputs.len() {
            differences.push(format!("inputs: {} there, {} now", there.inputs.len(), self.inputs.len()));
        }
        let changed = there.inputs.iter().zip(&self.inputs).find(|(was, is)| was != is);
        if let Some((was, is)) = changed {
            let shown = |input: &Input| {
                format!("{} of size {}", if input.name.is_empty() { "." } else { &input.name }, input.size)
            };
            differences.push(format!("input: {} there, {} now", shown(was), shown(is)));
        }
        differences
    }
}
