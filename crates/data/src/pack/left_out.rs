//! `left_out.jsonl`: which rows went into no shard, and why.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RowProblem;
use crate::DataError;

/// The state of `left_out.jsonl`.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
}

/// `left_out.jsonl`, open at its end. What is behind the state in `pack.json` is cut off when a packing is taken up.
pub(crate) struct LeftOutRows {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    state: LeftOut,
    first: Option<RowProblem>,
}

impl LeftOutRows {
    /// The list at `path`, which ends at `state`.
    pub(crate) fn behind(path: PathBuf, state: LeftOut) -> LeftOutRows {
        LeftOutRows { path, file: None, state, first: None }
    }

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

    /// Puts what was pushed safely on disk, and says what there is.
    pub(crate) fn sync(&mut self) -> Result<LeftOut, DataError> {
        if let Some(file) = &mut self.file {
            let synced = file.flush().and_then(|()| file.get_ref().sync_all());
            synced.map_err(DataError::io(&self.path))?;
        }
        Ok(self.state)
    }
}
