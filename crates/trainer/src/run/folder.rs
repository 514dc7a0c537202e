//! `runs/NAME`: where a run keeps everything, for one process at a time.
//!
//! ```text
//! runs/NAME/
//!   config.yaml       the resolved configuration     run.json        every start of the run
//!   lock              held while a process trains    finished        the steps of a run that is done
//!   metrics.jsonl  tensorboard/  quarantine.jsonl  bad_steps/  checkpoints/  export/
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use blip2_data::write_file;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::assembly::loading::LoadedPart;
use crate::config::{Change, Config, ConfigErrors, Difference};

/// Why a run folder cannot be used.
#[derive(Debug, Error)]
pub enum RunFolderError {
    /// A file in it cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process trains in it.
    #[error("{}: in use by {holder}; wait for it, or give this run another run.name", folder.display())]
    InUse {
        /// The run's folder.
        folder: PathBuf,
        /// Process and host, as the other process wrote them down.
        holder: String,
    },
    /// The run began with a configuration that makes another run.
    #[error(
        "{}: began with another configuration ({}); take these back, or give this run another run.name",
        folder.display(), list(differences)
    )]
    OtherConfig {
        /// The run's folder.
        folder: PathBuf,
        /// The keys that may not differ.
        differences: Vec<Difference>,
    },
    /// The run's own record of its configuration is not readable.
    #[error("{}: {}; restore it, or give this run another run.name", path.display(), one_line(source))]
    BadConfig {
        /// The run's `config.yaml`.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigErrors,
    },
    /// The tokenizer is not the one that the run began with.
    #[error(
        "{}: expected the file that the run began with, {}, got another; put it back, or give this run another run.name",
        path.display(), kept.display()
    )]
    OtherTokenizer {
        /// The file that is to be used.
        path: PathBuf,
        /// The run's copy.
        kept: PathBuf,
    },
    /// A new run was asked for where there is one.
    #[error("{}: holds a run already; continue it with --resume auto, or give this run another run.name", folder.display())]
    Exists {
        /// The run's folder.
        folder: PathBuf,
    },
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}

fn one_line(errors: &ConfigErrors) -> String {
    errors.iter().map(|error| error.to_string()).collect::<Vec<_>>().join("; ")
}

/// What to do with a run that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Go on with it.
    Continue,
    /// Refuse: nothing of it would survive a fresh start.
    Refuse,
}

/// What is written down about one start of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Version of this program.
    pub program_version: String,
    /// Version of libtorch.
    pub libtorch_version: String,
    /// Commit the program was built from, where known.
    pub git_commit: Option<String>,
    /// The device in words.
    pub device: String,
    /// How many processes trained together.
    #[serde(default = "one")]
    pub ranks: usize,
    /// What became of the weights that the parts began from.
    #[serde(default)]
    pub loaded: Vec<LoadedPart>,
}

/// A start with what the folder knows by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct StartRecord {
    started_unix_s: u64,
    host: String,
    pid: u32,
    #[serde(flatten)]
    start: Start,
    /// Keys that differ from the start before, as sentences.
    changed: Vec<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct RunRecord {
    starts: Vec<StartRecord>,
}

/// A run's folder, locked for as long as this value lives.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
    /// Keys that differ from the start before, as sentences.
    changed: Vec<String>,
}

impl RunFolder {
    /// Makes or takes up the folder that `config` names and locks it; a run begins there with [`RunFolder::begin`].
    ///
    /// # Errors
    /// Another process has it, it began with another configuration, there is a run although none is wanted, or a file
    /// cannot be read or written.
    pub fn open(config: &Config, existing: Existing) -> Result<Self, RunFolderError> {
        let path = config.run_folder();
        fs::create_dir_all(&path).map_err(io_error(&path))?;
        let lock = lock(&path)?;
        let changed = Self::check(config, existing)?;
        Ok(Self { path, _lock: lock, changed })
    }

    /// The changes with which the run that `config` names would go on, as sentences; nothing is made or locked.
    ///
    /// # Errors
    /// It began with another configuration, or is there although none is wanted.
    pub fn check(config: &Config, existing: Existing) -> Result<Vec<String>, RunFolderError> {
        let folder = config.run_folder();
        if existing == Existing::Refuse && config_path(&folder).exists() {
            return Err(RunFolderError::Exists { folder });
        }
        Ok(allowed_changes(config)?.iter().map(Difference::to_string).collect())
    }

    /// Whether the run's own record of its configuration is there.
    pub(crate) fn has_config(config: &Config) -> bool {
        config_path(&config.run_folder()).exists()
    }

    /// The keys in which `config` differs from the run's own; none where no run has begun.
    ///
    /// # Errors
    /// The run's own record of its configuration is not readable.
    pub fn differences(config: &Config) -> Result<Vec<Difference>, RunFolderError> {
        let path = config_path(&config.run_folder());
        if !path.exists() {
            return Ok(Vec::new());
        }
        let run = Config::load_resolved(&path).map_err(|source| RunFolderError::BadConfig { path, source })?;
        Ok(config.differences(&run))
    }

    /// Writes down this start and its configuration, without the credentials that it may hold: from now on the folder is that of `config`, and not finished.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn begin(&self, config: &Config, start: Start) -> Result<(), RunFolderError> {
        self.record_start(start)?;
        let path = config_path(&self.path);
        let kept = config.without_credentials().to_yaml();
        write_file(&path, kept.as_bytes()).map_err(io_error(&path))?;
        let marker = finished_path(&self.path);
        match fs::remove_file(&marker) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&marker)(error)),
            _ => Ok(()),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Folder of TensorBoard's event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// The metrics, one JSON object a line.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The samples that could not be read.
    pub fn quarantine(&self) -> PathBuf {
        self.path.join("quarantine.jsonl")
    }

    /// Where the tokenizer's files are kept, so that a checkpoint of this run can be exported.
    pub fn tokenizer(&self) -> PathBuf {
        self.path.join("tokenizer")
    }

    /// Keeps a copy of the tokenizer's files of a model directory, and the `tokenizer.json` that GPT-2's files or a SentencePiece model become. Of a
    /// BERT with a `vocab.txt` alone that is all there is.
    ///
    /// # Errors
    /// A file cannot be read or written, or is another than the run has kept: it would go on with other ids.
    pub fn keep_tokenizer(&self, from: &Path) -> Result<(), RunFolderError> {
        let to = self.tokenizer();
        fs::create_dir_all(&to).map_err(io_error(&to))?;
        let converted = blip2_data::converted_tokenizer(from).map_err(io::Error::other).map_err(io_error(from))?;
        if let Some(json) = converted.filter(|_| !to.join("tokenizer.json").exists()) {
            write_file(&to.join("tokenizer.json"), &json).map_err(io_error(&to))?;
        }
        for name in blip2_weights::TOKENIZER_FILES {
            let (path, kept) = (from.join(name), to.join(name));
            if !path.exists() {
                continue;
            }
            let bytes = fs::read(&path).map_err(io_error(&path))?;
            if !kept.exists() {
                write_file(&kept, &bytes).map_err(io_error(&to))?;
            } else if fs::read(&kept).map_err(io_error(&kept))? != bytes {
                return Err(RunFolderError::OtherTokenizer { path, kept });
            }
        }
        Ok(())
    }

    /// Writes down that the run is done with this many steps.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn mark_finished(&self, steps: u64) -> Result<(), RunFolderError> {
        let path = finished_path(&self.path);
        write_file(&path, format!("{steps}\n").as_bytes()).map_err(io_error(&path))
    }

    /// Whether the run that `config` names is done; with more `schedule.steps` than it has, it is not.
    ///
    /// # Errors
    /// What is done began with another configuration.
    pub fn is_finished(config: &Config) -> Result<bool, RunFolderError> {
        let folder = config.run_folder();
        // Without a readable marker the run goes on from its last checkpoint, which costs nothing where it was done.
        let marker = fs::read_to_string(finished_path(&folder)).unwrap_or_default();
        let finished = marker.trim().parse::<u64>().is_ok_and(|steps| steps >= config.schedule.steps);
        // Other shards are compared by their digests, which takes opening them.
        Ok(finished && allowed_changes(config)?.iter().all(|d| d.change != Change::ShardsMoved))
    }

    /// Whether `folder` is that of a run that is not done.
    pub fn is_unfinished(folder: &Path) -> bool {
        config_path(folder).exists() && !finished_path(folder).exists()
    }

    fn record_start(&self, start: Start) -> Result<(), RunFolderError> {
        let path = self.path.join("run.json");
        let mut record = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other).map_err(io_error(&path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => RunRecord::default(),
            Err(error) => return Err(io_error(&path)(error)),
        };
        let started_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let pid = std::process::id();
        let changed = self.changed.clone();
        record.starts.push(StartRecord { started_unix_s, host: host_name(), pid, start, changed });
        let json = serde_json::to_vec_pretty(&record).map_err(io::Error::other).map_err(io_error(&path))?;
        write_file(&path, &json).map_err(io_error(&path))
    }
}

/// This machine's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Folder of the batches and weights of a run's non-finite steps.
pub fn bad_steps(config: &Config) -> PathBuf {
    config.run_folder().join("bad_steps")
}

fn one() -> usize {
    1
}

fn config_path(folder: &Path) -> PathBuf {
    folder.join("config.yaml")
}

/// The keys in which `config` differs from the run's own, where the run may go on with all of them.
fn allowed_changes(config: &Config) -> Result<Vec<Difference>, RunFolderError> {
    let (refused, allowed): (Vec<_>, Vec<_>) =
        RunFolder::differences(config)?.into_iter().partition(|difference| difference.change == Change::Refused);
    if !refused.is_empty() {
        return Err(RunFolderError::OtherConfig { folder: config.run_folder(), differences: refused });
    }
    Ok(allowed)
}

fn finished_path(folder: &Path) -> PathBuf {
    folder.join("finished")
}

/// Takes the folder's lock; the system gives it back however the process ends.
fn lock(folder: &Path) -> Result<File, RunFolderError> {
    let path = folder.join("lock");
    let mut file =
        OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path).map_err(io_error(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(io_error(&path)(error)),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let known = file.read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
            let holder = if known { holder.trim().to_string() } else { "another process".to_string() };
            return Err(RunFolderError::InUse { folder: folder.to_path_buf(), holder });
        }
    }
    let holder = format!("process {} on {}\n", std::process::id(), host_name());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(holder.as_bytes()))
        .map_err(io_error(&path))?;
    Ok(file)
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> RunFolderError + '_ {
    move |source| RunFolderError::Io { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Start {
        Start {
            program_version: "0.1.0".into(),
            libtorch_version: "2.11.0".into(),
            git_commit: None,
            device: "cpu".into(),
            ranks: 1,
            loaded: Vec::new(),
        }
    }

    /// A configuration of a run inside `folder`; its weights need not exist.
    fn config(folder: &Path, more: &str) -> Config {
        let path = folder.join("given.yaml");
        let text = format!(
            "run: {{dir: {}, name: a}}\ntask: {{stage: 1}}\nmodel: {{vision: {{weights: v}}, qformer: {{init: q}}}}\n\
             data: {{train: [{{shards: s.tar}}]}}\n{more}",
            folder.display()
        );
        fs::write(&path, text).unwrap();
        Config::load_resolved(&path).unwrap()
    }

    fn begun(config: &Config, existing: Existing) -> RunFolder {
        let folder = RunFolder::open(config, existing).unwrap();
        folder.begin(config, start()).unwrap();
        folder
    }

    #[test]
    fn two_runs_in_one_folder_at_once_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let config = config(base.path(), "");
        let first = begun(&config, Existing::Continue);
        let error = RunFolder::open(&config, Existing::Continue).unwrap_err().to_string();
        let holder = format!("in use by process {} on {}; ", std::process::id(), host_name());
        assert!(error.contains(&holder), "{error}");
        drop(first);
        RunFolder::open(&config, Existing::Continue).unwrap();
    }

    #[test]
    fn another_configuration_is_refused_with_the_difference() {
        let base = tempfile::tempdir().unwrap();
        drop(begun(&config(base.path(), ""), Existing::Continue));
        let before = fs::read(base.path().join("a/config.yaml")).unwrap();
        let other = config(base.path(), "optimizer: {lr: 2e-4}\nlog: {every: 1}\n");
        let error = RunFolder::open(&other, Existing::Continue).unwrap_err().to_string();
        assert!(error.contains("(optimizer.lr: 0.0001 in the run, 0.0002 here)"), "{error}");
        // The one key of its section that decides about the order of the samples.
        let mut other = config(base.path(), "");
        (other.data.loader.window_shards, other.data.loader.prefetch) = (4, 1);
        let error = RunFolder::open(&other, Existing::Continue).unwrap_err().to_string();
        assert!(error.contains("(data.loader.window_shards: 8 in the run, 4 here)"), "{error}");
        assert_eq!(fs::read(base.path().join("a/config.yaml")).unwrap(), before);
    }

    #[test]
    fn allowed_changes_are_kept_and_written_down() {
        let base = tempfile::tempdir().unwrap();
        drop(begun(&config(base.path(), ""), Existing::Continue));
        let changed = config(base.path(), "log: {every: 1}\n");
        drop(begun(&changed, Existing::Continue));
        assert_eq!(Config::load_resolved(&base.path().join("a/config.yaml")).unwrap(), changed);
        let record: RunRecord = serde_json::from_slice(&fs::read(base.path().join("a/run.json")).unwrap()).unwrap();
        assert_eq!(record.starts.len(), 2);
        assert_eq!(record.starts[1].changed, ["log.every: 20 in the run, 1 here"]);
        assert_eq!(record.starts[0].start, start());
    }

    #[test]
    fn credentials_are_not_written_down_and_may_change() {
        let base = tempfile::tempdir().unwrap();
        let with = |token: &str| {
            let mut config = config(base.path(), "log: {every: 7}\n");
            config.data.train[0].shards = format!("https://user:{token}@host/{{0..9}}.tar");
            config
        };
        drop(begun(&with("secret"), Existing::Continue));
        for file in ["config.yaml", "run.json"] {
            assert!(!fs::read_to_string(base.path().join("a").join(file)).unwrap().contains("secret"));
        }
        // Neither the same nor other credentials are other shards.
        for token in ["secret", "newer"] {
            drop(RunFolder::open(&with(token), Existing::Continue).unwrap());
            assert!(RunFolder::differences(&with(token)).unwrap().is_empty());
        }
        assert!(with("secret").settings().iter().all(|(_, value)| !value.contains("secret")));
        let mut moved = with("secret");
        moved.data.train[0].shards = "https://user:secret@other/{0..9}.tar".into();
        let difference = &RunFolder::differences(&moved).unwrap()[0];
        assert_eq!(difference.change, Change::ShardsMoved);
        assert!(!difference.to_string().contains("secret"), "{difference}");
    }

    #[test]
    fn a_tokenizer_that_was_changed_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let folder = begun(&config(base.path(), ""), Existing::Continue);
        let file = base.path().join("tokenizer.json");
        fs::write(&file, "{}").unwrap();
        folder.keep_tokenizer(base.path()).unwrap();
        folder.keep_tokenizer(base.path()).unwrap();
        fs::write(&file, "{ }").unwrap();
        let error = folder.keep_tokenizer(base.path()).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{}: expected the file that the run began with, ", file.display())),
            "{error}"
        );
        assert_eq!(fs::read_to_string(folder.tokenizer().join("tokenizer.json")).unwrap(), "{}");
    }

    #[test]
    fn a_new_run_does_not_take_a_folder_that_holds_one() {
        let base = tempfile::tempdir().unwrap();
        let config = config(base.path(), "");
        drop(begun(&config, Existing::Refuse));
        let error = RunFolder::open(&config, Existing::Refuse).unwrap_err();
        assert!(matches!(error, RunFolderError::Exists { .. }), "{error}");
    }

    #[test]
    fn a_damaged_configuration_is_one_clear_line() {
        let base = tempfile::tempdir().unwrap();
        let config = config(base.path(), "");
        drop(begun(&config, Existing::Continue));
        fs::write(base.path().join("a/config.yaml"), "run: {names: [").unwrap();
        let error = RunFolder::open(&config, Existing::Continue).unwrap_err().to_string();
        assert!(error.contains("config.yaml: ") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_longer_schedule_makes_a_finished_run_unfinished() {
        let base = tempfile::tempdir().unwrap();
        let config = config(base.path(), "schedule: {steps: 2000}\n");
        let folder = begun(&config, Existing::Continue);
        assert!(!RunFolder::is_finished(&config).unwrap());
        assert!(RunFolder::is_unfinished(folder.path()) && !RunFolder::is_unfinished(base.path()));
        folder.mark_finished(2000).unwrap();
        assert!(!RunFolder::is_unfinished(folder.path()));
        assert!(RunFolder::is_finished(&config).unwrap());
        let mut longer = config.clone();
        longer.schedule.steps = 2001;
        assert!(!RunFolder::is_finished(&longer).unwrap());
        let mut other = config.clone();
        other.optimizer.lr = 2e-4;
        assert!(matches!(RunFolder::is_finished(&other), Err(RunFolderError::OtherConfig { .. })));
        folder.begin(&config, start()).unwrap();
        assert!(!RunFolder::is_finished(&config).unwrap(), "what trains is not finished");
    }

    #[test]
    fn what_never_began_takes_any_configuration() {
        let base = tempfile::tempdir().unwrap();
        drop(RunFolder::open(&config(base.path(), ""), Existing::Refuse).unwrap());
        drop(begun(&config(base.path(), "optimizer: {lr: 2e-4}\n"), Existing::Refuse));
    }
}
