//! `pack.json`: what a folder of shards knows of its packing. Of what the shards are, and which rows went into each.
//!
//! Lines of JSON: options and inputs, then a line for each shard, then one that says that it was the last. A line is
//! appended and synced, so the shards before it are not written again. Of a last line that a kill has cut the shard has
//! no name yet: the line is dropped.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::left_out::LeftOut;
use super::source::Input;
use crate::{DataError, atomic};

const FORMAT: &str = "blip2-pack";
const VERSION: u32 = 2;
/// Its first line held all the others.
const ONE_LINE: u32 = 1;

/// The contents of `pack.json`, as its first line begins them.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Ledger {
    format: String,
    version: u32,
    options: Map<String, Value>,
    inputs: Vec<Input>,
    #[serde(default, skip_serializing)]
    pub(crate) shards: Vec<Shard>,
    /// Rows that were left out in all; there once every row has been packed.
    #[serde(default, skip_serializing)]
    pub(crate) complete: Option<LeftOut>,
}

/// A further line.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    Shard(Shard),
    Complete { complete: LeftOut },
}

/// A shard and the rows that it is made of.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Shard {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) samples: u64,
    /// First row, counted from 0, and the one behind the last.
    pub(crate) rows: (u64, u64),
    pub(crate) left_out: LeftOut,
}

/// The name of the shard of this number.
pub(crate) fn shard_name(number: usize) -> String {
    format!("{number:05}.tar")
}

impl Ledger {
    /// Of a packing that begins.
    pub(crate) fn new(options: Map<String, Value>, inputs: Vec<Input>) -> Ledger {
        Ledger { format: FORMAT.to_owned(), version: VERSION, options, inputs, shards: Vec::new(), complete: None }
    }

    /// What `pack.json` says, and whether it says just that: not, where a line was cut, or it is of an older version.
    pub(crate) fn read(path: &Path) -> Result<Option<(Ledger, bool)>, DataError> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(DataError::io(path))?,
        };
        let damaged = |reason: String| DataError::PackDamaged { path: path.to_owned(), reason };
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate().peekable();
        let first = lines.next().map_or(&[][..], |(_, line)| line);
        let mut ledger: Ledger = serde_json::from_slice(first).map_err(|error| damaged(error.to_string()))?;
        let of_first_line = std::mem::take(&mut ledger.shards);
        let mut exact = match (ledger.format.as_str(), ledger.version) {
            (FORMAT, VERSION) => true,
            (FORMAT, ONE_LINE) => false,
            (format, version) => {
                return Err(damaged(format!("is {format} version {version}, not {FORMAT} version {VERSION}")));
            }
        };
        exact &= first.ends_with(b"\n");
        ledger.version = VERSION;
        for shard in of_first_line {
            ledger.push(shard).map_err(damaged)?;
        }
        while let Some((at, line)) = lines.next() {
            let whole = line.ends_with(b"\n") && ledger.complete.is_none();
            match serde_json::from_slice(line) {
                Ok(Line::Shard(shard)) if whole => ledger.push(shard).map_err(damaged)?,
                Ok(Line::Complete { complete }) if whole => ledger.complete = Some(complete),
                _ if lines.peek().is_none() && ledger.complete.is_none() => exact = false,
                _ => return Err(damaged(format!("its line {} is none of a packing", at + 1))),
            }
        }
        Ok(Some((ledger, exact)))
    }

    /// Adds a shard of `pack.json`, which must go on where the one before ended: names and numbers from a file are not trusted.
    fn push(&mut self, shard: Shard) -> Result<(), String> {
        let (first, end) = shard.rows;
        let next = self.shards.last().map_or(0, |last| last.rows.1);
        let goes_on = first == next && first < end && shard.samples <= end - first;
        if !goes_on || shard.name != shard_name(self.shards.len()) {
            return Err(format!("shard {} does not go on behind row {next}", shard.name));
        }
        self.shards.push(shard);
        Ok(())
    }

    /// Writes it whole.
    pub(crate) fn write(&self, path: &Path) -> Result<(), DataError> {
        let shards = self.shards.iter().cloned().map(Line::Shard);
        let complete = self.complete.map(|complete| Line::Complete { complete });
        let written = atomic::write(path, |out| {
            writeln!(out, "{}", serde_json::json!(self))?;
            shards.chain(complete).try_for_each(|line| writeln!(out, "{}", serde_json::json!(line)))
        });
        written.map_err(DataError::io(path))
    }

    /// What another packing's options and inputs have that these have not, and the other way round.
    pub(crate) fn differences(&self, there: &Ledger) -> Vec<String> {
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
        let changed = there.inputs.iter().zip(&self.inputs).find_map(|(was, is)| is.difference(was));
        differences.extend(changed.map(|changed| format!("input: {changed}")));
        differences
    }
}

impl Line {
    /// Adds it to the file at `path`.
    pub(crate) fn append(&self, path: &Path) -> Result<(), DataError> {
        let add = || {
            let mut file = OpenOptions::new().append(true).open(path)?;
            file.write_all(format!("{}\n", serde_json::json!(self)).as_bytes())?;
            file.sync_all()
        };
        add().map_err(DataError::io(path))
    }
}
