//! The folder of a run's checkpoints: atomic writing, verified reading, retention.
//!
//! A checkpoint is written under a hidden name, synced file by file, sealed by its manifest, then renamed to
//! `step_00001000`; so whatever bears such a name was complete when it was written. Removal goes the same way back.
//! Hidden names that a crash left behind are cleaned up when the store is opened.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::CheckpointError;
use super::folder::{CheckpointFolder, write_error};
use super::manifest::{Checkpoint, Manifest, Metric};
use crate::config::BestMetric;

const WRITING: &str = ".writing-";
const REMOVING: &str = ".removing-";
const REPLACED: &str = ".replaced-";

/// A run's checkpoints; one process at a time (the run folder's lock sees to that).
#[derive(Debug)]
pub struct CheckpointStore {
    folder: PathBuf,
    keep: usize,
    best: Option<BestMetric>,
}

/// A checkpoint that was not taken, and why.
#[derive(Debug)]
pub struct Rejected {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: CheckpointError,
}

/// The newest checkpoint that is whole.
#[derive(Debug)]
pub struct Newest {
    /// It, where there is one.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are damaged.
    pub rejected: Vec<Rejected>,
}

impl Newest {
    /// The checkpoint, for those who cannot do without one.
    ///
    /// # Errors
    /// There is none, or each is damaged; `run` is the folder that was asked for.
    pub(crate) fn or_none_of(self, run: &Path) -> Result<(Checkpoint, Vec<Rejected>), CheckpointError> {
        let run = run.to_path_buf();
        match (self.checkpoint, self.rejected.into_iter()) {
            (Some(checkpoint), rejected) => Ok((checkpoint, rejected.collect())),
            (None, mut rejected) => Err(match rejected.next() {
                None => CheckpointError::NoneYet { run },
                Some(newest) => CheckpointError::AllDamaged { run, newest: Box::new(newest.reason) },
            }),
        }
    }
}

impl CheckpointStore {
    /// Opens or makes the folder, and cleans up what a crash left behind.
    ///
    /// `keep` of the newest checkpoints stay, and besides them the one that is best by `best`.
    ///
    /// # Errors
    /// The folder cannot be read or changed.
    pub fn open(folder: &Path, keep: usize, best: Option<BestMetric>) -> Result<Self, CheckpointError> {
        fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
        for name in names(folder)? {
            let path = folder.join(&name);
            if let Some(step) = name.strip_prefix(REPLACED)
                && !folder.join(step).exists()
            {
                rename(&path, &folder.join(step))?;
            } else if [WRITING, REMOVING, REPLACED].iter().any(|prefix| name.starts_with(prefix)) {
                fs::remove_dir_all(&path).map_err(CheckpointError::io(path))?;
            }
        }
        Ok(Self { folder: folder.to_path_buf(), keep: keep.max(1), best })
    }

    /// The folder as a reader sees it whose run may be training at this moment: nothing is made or cleaned up.
    pub fn read_only(folder: &Path, best: Option<BestMetric>) -> Self {
        Self { folder: folder.to_path_buf(), keep: usize::MAX, best }
    }

    /// Steps of all checkpoints, oldest first, damaged ones included.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let names = match names(&self.folder) {
            // A run that was stopped before it came to one, seen by a reader.
            Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names?,
        };
        let mut steps: Vec<u64> = names.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The folder of the checkpoint of this step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(step_name(step))
    }

    /// The newest checkpoint whose files are what its manifest says, and the newer ones that are not.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn newest(&self) -> Result<Newest, CheckpointError> {
        let mut rejected = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let path = self.path(step);
            match Checkpoint::open(&path) {
                Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), rejected }),
                // Says nothing of what the files hold: an older one must not take its place.
                Err(error) if error.is_of_this_machine() => return Err(error),
                Err(reason) => rejected.push(Rejected { path, reason }),
            }
        }
        Ok(Newest { checkpoint: None, rejected })
    }

    /// The best checkpoint where one is and is whole, else the newest that is whole.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn preferred(&self) -> Result<Newest, CheckpointError> {
        let Some(best) = self.best_of(&self.steps()?) else { return self.newest() };
        let path = self.path(best);
        match Checkpoint::open(&path) {
            Ok(checkpoint) => Ok(Newest { checkpoint: Some(checkpoint), rejected: Vec::new() }),
            Err(error) if error.is_of_this_machine() => Err(error),
            Err(reason) => {
                let mut newest = self.newest()?;
                if !newest.rejected.iter().any(|rejected| rejected.path == path) {
                    newest.rejected.insert(0, Rejected { path, reason });
                }
                Ok(newest)
            }
        }
    }

    /// Renames every checkpoint after `step` to `step_...superseded`, so that a run that goes on from `step` neither
    /// counts nor overwrites them; returns their new paths.
    ///
    /// # Errors
    /// The folder cannot be changed.
    pub(crate) fn set_aside_after(&self, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
        let mut paths = Vec::new();
        for newer in self.steps()?.into_iter().filter(|&newer| newer > step) {
            let aside = self.folder.join(format!("{}.superseded", step_name(newer)));
            if aside.exists() {
                fs::remove_dir_all(&aside).map_err(CheckpointError::io(&aside))?;
            }
            rename(&self.path(newer), &aside)?;
            paths.push(aside);
        }
        Ok(paths)
    }

    /// Writes the checkpoint of `step` with `fill`, then removes those that need not stay; returns its folder.
    ///
    /// `metric`: what was measured at this very step, where something was. A checkpoint of the same step is replaced.
    ///
    /// # Errors
    /// A file cannot be written, in which case what was there before stays as it was.
    pub fn write(
        &self,
        step: u64,
        metric: Option<Metric>,
        fill: impl FnOnce(&mut CheckpointFolder) -> Result<(), CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        let writing = self.folder.join(format!("{WRITING}{}", step_name(step)));
        let path = self.path(step);
        self.fill_and_commit(&writing, &path, step, metric, fill).inspect_err(|_| {
            // Gives the space back; what remains is cleaned up when the store is opened again.
            let _ = fs::remove_dir_all(&writing);
        })?;
        self.remove_old()?;
        Ok(path)
    }

    fn fill_and_commit(
        &self,
        writing: &Path,
        path: &Path,
        step: u64,
        metric: Option<Metric>,
        fill: impl FnOnce(&mut CheckpointFolder) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        if writing.exists() {
            fs::remove_dir_all(writing).map_err(write_error(writing))?;
        }
        let mut folder = CheckpointFolder::create(writing.to_path_buf())?;
        fill(&mut folder)?;
        folder.seal(step, metric)?;

        let replaced = self.folder.join(format!("{REPLACED}{}", step_name(step)));
        let replaces = path.exists();
        if replaces {
            fs::rename(path, &replaced).map_err(write_error(path))?;
        }
        fs::rename(writing, path).map_err(write_error(path))?;
        sync(&self.folder).map_err(write_error(&self.folder))?;
        if replaces {
            fs::remove_dir_all(&replaced).map_err(CheckpointError::io(replaced))?;
        }
        Ok(())
    }

    /// Removes all but the newest `keep` and the best.
    fn remove_old(&self) -> Result<(), CheckpointError> {
        let steps = self.steps()?;
        let best = self.best_of(&steps);
        let old = &steps[..steps.len().saturating_sub(self.keep)];
        for &step in old.iter().filter(|&&step| Some(step) != best) {
            let removing = self.folder.join(format!("{REMOVING}{}", step_name(step)));
            rename(&self.path(step), &removing)?;
            fs::remove_dir_all(&removing).map_err(CheckpointError::io(removing))?;
        }
        Ok(())
    }

    /// The step whose manifest holds the best value; of equal ones the earliest.
    fn best_of(&self, steps: &[u64]) -> Option<u64> {
        let best = self.best?;
        let mut found: Option<(u64, f64)> = None;
        for &step in steps {
            // One without a readable manifest cannot be shown to be the best.
            let Ok(Manifest { metric: Some(metric), .. }) = Manifest::read(&self.path(step)) else { continue };
            let better = found.is_none_or(|(_, value)| best.prefers(metric.value, value));
            if metric.name == best.as_str() && better {
                found = Some((step, metric.value));
            }
        }
        found.map(|(step, _)| step)
    }
}

fn step_name(step: u64) -> String {
    format!("step_{step:08}")
}

/// The step of a checkpoint's folder; of nothing else.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step_")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

fn names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let read = || -> io::Result<Vec<String>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    read().map_err(CheckpointError::io(folder))
}

/// Makes the names in a folder last through a power failure.
fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

fn rename(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::rename(from, to).map_err(CheckpointError::io(from))
}
