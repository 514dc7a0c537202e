//! `metrics.jsonl`: one object a line, `step` first; NaN and infinities are `null`, which JSON has no other word for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use blip2_data::write_file;
use serde_json::{Map, Value};

use super::TelemetryError;

/// Named scalars measured after a number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Optimizer steps done.
    pub step: u64,
    /// Names and values, in order.
    pub scalars: Vec<(String, f64)>,
}

impl Record {
    /// A record of these scalars.
    pub fn new<N: Into<String>>(step: u64, scalars: impl IntoIterator<Item = (N, f64)>) -> Self {
        Self { step, scalars: scalars.into_iter().map(|(name, value)| (name.into(), value)).collect() }
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.scalars.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// Whether it holds what an evaluation has measured.
    pub fn is_of_evaluation(&self) -> bool {
        self.scalars.iter().any(|(name, _)| name.starts_with("val_") || name.starts_with("retrieval_"))
    }

    fn to_line(&self) -> String {
        let mut object = Map::new();
        object.insert("step".into(), self.step.into());
        object.extend(self.scalars.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        format!("{}\n", Value::Object(object))
    }

    /// The record of a line; a torn or foreign line has none.
    fn from_line(line: &[u8]) -> Option<Self> {
        let object: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let step = object.get("step")?.as_u64()?;
        let scalars = object.iter().filter(|(name, _)| *name != "step");
        Some(Self::new(step, scalars.map(|(name, value)| (name, value.as_f64().unwrap_or(f64::NAN)))))
    }
}

/// Appends records; each is one write, so that a reader never sees half a line of a living run.
#[derive(Debug)]
pub(super) struct JsonlWriter {
    path: PathBuf,
    file: File,
}

impl JsonlWriter {
    pub(super) fn open(path: &Path) -> Result<Self, TelemetryError> {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(TelemetryError::at(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    pub(super) fn append(&mut self, record: &Record) -> Result<(), TelemetryError> {
        self.file.write_all(record.to_line().as_bytes()).map_err(TelemetryError::at(&self.path))
    }

    pub(super) fn sync(&mut self) -> Result<(), TelemetryError> {
        self.file.sync_all().map_err(TelemetryError::at(&self.path))
    }
}

/// Cuts a JSONL file back to the records that `keeps` names, and returns them; the file is replaced as a whole.
///
/// A last line that a crash tore, and any line that is not a record, goes too. No file is as good as an empty one.
///
/// # Errors
/// The file cannot be read or written.
pub fn cut_back(path: &Path, keeps: impl Fn(&Record) -> bool) -> Result<Vec<Record>, TelemetryError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TelemetryError::at(path)(error)),
    };
    let mut kept = Vec::with_capacity(bytes.len());
    let mut records = Vec::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        if let Some(record) = Record::from_line(line)
            && keeps(&record)
        {
            kept.extend_from_slice(line);
            records.push(record);
        }
    }
    if kept != bytes {
        write_file(path, &kept).map_err(TelemetryError::at(path))?;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn a_line_holds_step_and_scalars_in_order() {
        let record = Record::new(20, [("loss_itm", 0.5), ("lr", 1e-4), ("grad_norm", f64::NAN)]);
        assert_eq!(record.to_line(), "{\"step\":20,\"loss_itm\":0.5,\"lr\":0.0001,\"grad_norm\":null}\n");
        assert!(Record::from_line(record.to_line().as_bytes()).unwrap().get("grad_norm").unwrap().is_nan());
    }

    #[test]
    fn later_torn_and_foreign_lines_go() {
        let (_folder, path) =
            file(b"{\"step\":1,\"a\":1}\n\0\0\0\n[]\n{\"step\":3,\"a\":3}\n{\"step\":2,\"a\":2}\n{\"step\":2,\"a\"");
        let records = cut_back(&path, |record| record.step <= 2).unwrap();
        assert_eq!(records, [Record::new(1, [("a", 1.0)]), Record::new(2, [("a", 2.0)])]);
        assert_eq!(fs::read(&path).unwrap(), b"{\"step\":1,\"a\":1}\n{\"step\":2,\"a\":2}\n");
    }

    #[test]
    fn no_file_has_no_records() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(cut_back(&folder.path().join("metrics.jsonl"), |_| true).unwrap(), []);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn wherever_a_crash_cuts_the_file_whole_lines_survive(steps in 1u64..20, cut in 0usize..400) {
            let lines: Vec<String> = (0..steps).map(|step| Record::new(step, [("loss", step as f64)]).to_line()).collect();
            let whole = lines.concat();
            let cut = cut.min(whole.len());
            let (_folder, path) = file(&whole.as_bytes()[..cut]);
            let records = cut_back(&path, |_| true).unwrap();
            let survivors = whole[..cut].matches('\n').count();
            prop_assert_eq!(records.len(), survivors);
            prop_assert_eq!(fs::read_to_string(&path).unwrap(), lines[..survivors].concat());
        }
    }
}
