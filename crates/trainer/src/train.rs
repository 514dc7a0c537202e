//! `train`: one stage after the other, each finished, continued or begun.

use std::path::PathBuf;

use blip2_torchx::device;

use crate::blueprint::Blueprint;
use crate::config::{Config, DeviceChoice};
use crate::error::Error;
use crate::features::MemoryCaches;
use crate::hub::Hub;
use crate::run::Run;
use crate::run_folder::RunFolder;
use crate::signals::StopSignal;
use crate::telemetry::Output;

/// What a run does about checkpoints that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Go on from the newest one that is whole.
    Auto,
    /// Refuse a folder that holds a run.
    Never,
    /// Go on from this one.
    Path(PathBuf),
}

/// What `train` is asked for.
pub struct TrainRequest {
    /// One file a stage, in order.
    pub configs: Vec<PathBuf>,
    /// `key.path=value` overrides of every file.
    pub sets: Vec<String>,
    /// What to do about checkpoints that are there.
    pub resume: Resume,
    /// Check everything and run one batch through, but write nothing.
    pub dry_run: bool,
    /// Where models come from that are named by a hub id.
    pub hub: Hub,
    /// Where `data.shard_cache.dir: auto` is.
    pub shard_cache: Option<PathBuf>,
    /// Makes the display of a stage's progress.
    pub output: fn() -> Output,
    /// Takes lines that are no progress.
    pub say: fn(&str),
    /// The commit the program was built from, where known.
    pub git_commit: Option<String>,
}

/// How `train` ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finished {
    /// Every stage is done.
    Done,
    /// A signal stopped it after a checkpoint; the same command goes on.
    Interrupted {
        /// The stage's folder.
        folder: PathBuf,
        /// Steps done.
        step: u64,
    },
}

/// Trains every stage in turn; stages that are finished are skipped.
///
/// # Errors
/// Every mistake of every file at once; then whatever stops a stage.
pub fn run(request: &TrainRequest) -> Result<Finished, Error> {
    let mut configs = Config::load_all(&request.configs, &request.sets)?;
    if matches!(request.resume, Resume::Path(_)) && configs.len() > 1 {
        return Err(Error::Mismatch(
            "--resume PATH: expected a single --config, since a checkpoint belongs to one stage".into(),
        ));
    }
    let mut caches = MemoryCaches::default();
    let stop = StopSignal::listen().map_err(|e| Error::file("signals", e))?;
    for config in &mut configs {
        let folder = config.run_folder();
        request.hub.keep_commits(config);
        config.data.shard_cache.settle(request.shard_cache.as_deref());
        if request.resume == Resume::Auto && RunFolder::is_finished(config)? {
            (request.say)(&format!("{}: finished already, {} steps", folder.display(), config.schedule.steps));
            continue;
        }
        request.hub.resolve(config)?;
        if request.dry_run {
            if config.model.qformer.init.exists() {
                let blueprint = Blueprint::open(config)?;
                (request.say)(&Run::try_one_batch(config, blueprint, select_device(config)?)?);
            } else {
                let init = config.model.qformer.init.display();
                (request.say)(&format!(
                    "{}: config is good; {init} will be made by the stage before",
                    folder.display()
                ));
            }
            continue;
        }
        // Before the device is touched.
        let blueprint = Blueprint::open(config)?;
        let mut run = Run::open(config, blueprint, request, select_device(config)?, &mut caches)?;
        let step = run.train(&stop)?;
        if step < config.schedule.steps {
            return Ok(Finished::Interrupted { folder, step });
        }
    }
    Ok(Finished::Done)
}

/// The device that `run.device` names.
///
/// # Errors
/// CUDA that is asked for and not there.
pub fn select_device(config: &Config) -> Result<tch::Device, Error> {
    let choice = match config.run.device {
        DeviceChoice::Auto => device::DeviceChoice::Auto,
        DeviceChoice::Cpu => device::DeviceChoice::Cpu,
        DeviceChoice::Cuda(index) => device::DeviceChoice::Cuda(index),
    };
    Ok(device::select(choice)?)
}
