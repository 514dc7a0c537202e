//! The steps in which a run is opened, one method each.

use std::time::{Duration, Instant};

use blip2_data::feature_store::Writer;
use blip2_torchx::device;
use tch::Device;

use super::books::Books;
use crate::assembly::blueprint::Blueprint;
use crate::assembly::{Assembly, check_frozen, weights_checksum};
use crate::checkpoint::snapshot::restore;
use crate::checkpoint::{Checkpoint, CheckpointStore, CheckpointWriter, TrainState};
use crate::config::{Config, NegativeSamples, Stage};
use crate::data::index_lines::SetOpening;
use crate::data::sets::DataSets;
use crate::data::{TrainData, run_number};
use crate::error::Error;
use crate::evaluation::HeldOutSet;
use crate::features::memory::MemoryCaches;
use crate::ranks::{Claims, Ranks, SHOWN_WITHIN, check_shared};
use crate::run::folder::{RunFolder, Start};
use crate::run::quarantine::Quarantine;
use crate::step::Stepper;
use crate::telemetry::{Shown, Telemetry, TelemetryPlan};
use crate::train::{Resume, TrainRequest};

/// Progress of a cache that is being filled is said this often.
const FILL_LINE_EVERY: Duration = Duration::from_secs(5);

/// A run that is being opened.
pub(super) struct Opening<'a> {
    config: &'a Config,
    request: &'a TrainRequest,
    ranks: &'a dyn Ranks,
    /// The run's folder, with which lines begin.
    name: String,
}

impl<'a> Opening<'a> {
    pub(super) fn new(config: &'a Config, request: &'a TrainRequest, ranks: &'a dyn Ranks) -> Opening<'a> {
        Opening { config, request, ranks, name: config.run_folder().display().to_string() }
    }

    /// The first rank locks the folder with its checkpoints, and all make sure that it is the same one.
    pub(super) fn take_folder(&self) -> Result<Option<(CheckpointStore, RunFolder)>, Error> {
        let Opening { config, request, ranks, .. } = self;
        let mut kept = None;
        if ranks.is_first() {
            let folder = RunFolder::open(config, request.existing())?;
            let (keep, best) = (config.checkpoint.keep, config.checkpoint.best);
            kept = Some((CheckpointStore::open(&folder.checkpoints(), keep, best)?, folder));
        }
        let patience = request.launch.as_ref().map_or(SHOWN_WITHIN, |launch| launch.meeting.patience.min(SHOWN_WITHIN));
        check_shared(&config.run_folder(), patience, *ranks)?;
        Ok(kept)
    }

    /// The checkpoint that the first rank chooses from its store, opened by all.
    pub(super) fn choose_checkpoint(&self, store: Option<&CheckpointStore>) -> Result<Option<Checkpoint>, Error> {
        let found = store.map_or(Ok(None), |store| self.find_checkpoint(store))?;
        let step = found.as_ref().map_or(u64::MAX, Checkpoint::step);
        let step = self.ranks.share_numbers(&[step])?[0][0];
        if self.ranks.is_first() || step == u64::MAX {
            return Ok(found);
        }
        let path = match &self.request.resume {
            Resume::Path(path) => path.clone(),
            Resume::Auto | Resume::Never => {
                CheckpointStore::read_only(&self.config.run_folder().join("checkpoints"), None).path(step)
            }
        };
        let lacks = |error| {
            Error::Mismatch(format!(
                "rank {} cannot read the checkpoint that rank 0 goes on from: {error}; run.dir must be a folder that all hosts share",
                self.ranks.rank()
            ))
        };
        Checkpoint::open(&path).map(Some).map_err(lacks)
    }

    fn find_checkpoint(&self, store: &CheckpointStore) -> Result<Option<Checkpoint>, Error> {
        match &self.request.resume {
            Resume::Path(path) => Ok(Some(Checkpoint::open(path)?)),
            Resume::Never => Ok(None),
            Resume::Auto => {
                let newest = store.newest()?;
                for rejected in &newest.rejected {
                    self.say(&format!("{}: damaged, passed over: {}", rejected.path.display(), rejected.reason));
                }
                if newest.checkpoint.is_none() && !newest.rejected.is_empty() {
                    self.say("no whole checkpoint is left: the run begins anew, and the damaged ones are set aside");
                }
                Ok(newest.checkpoint)
            }
        }
    }

    /// The sets, which must be those that the checkpoint was trained on; one that is named must be of this configuration. That something held out
    /// can be read is seen here, too: before weights are loaded and caches filled, and not at the first evaluation, by when hours may have gone.
    pub(super) fn open_sets(&self, checkpoint: Option<&Checkpoint>, blueprint: &Blueprint) -> Result<DataSets, Error> {
        let state = checkpoint.map(TrainState::read).transpose()?;
        // Where the folder's own record of the configuration is gone, the checkpoint's has to do.
        let by_digest = matches!(self.request.resume, Resume::Path(_)) || !RunFolder::has_config(self.config);
        if let (Some(state), Some(checkpoint), true) = (&state, checkpoint, by_digest)
            && state.config_digest != self.config.digest()
        {
            return Err(Error::OtherRun { checkpoint: checkpoint.path().to_path_buf() });
        }
        self.ranks.enter(0, "opening data");
        let say = self.ranks.is_first().then_some(self.request.say);
        let sets = DataSets::open(self.config, SetOpening { say, dry_run: false }, self.ranks)?;
        if let Some(state) = &state {
            self.check_continues(state, &sets)?;
        }
        if let Some(held_out) = &sets.held_out {
            HeldOutSet::check(self.config, held_out, blueprint)?;
        }
        Ok(sets)
    }

    /// The models with the weights that they begin from.
    pub(super) fn build(&self, blueprint: Blueprint, device: Device) -> Result<Assembly, Error> {
        self.say(&format!("{}: loading models on {}", self.name, device::name(device)));
        self.ranks.enter(0, "loading models");
        let assembly = Assembly::build(self.config, blueprint, device)?;
        assembly.loaded.iter().for_each(|part| self.say(&format!("{}: {part}", self.name)));
        Ok(assembly)
    }

    /// The training data and the held-out set, with the memory caches filled that the configuration wants.
    pub(super) fn fill_caches(
        &self,
        sets: &DataSets,
        assembly: &Assembly,
        caches: &mut MemoryCaches,
    ) -> Result<(TrainData, Option<HeldOutSet>), Error> {
        let mut fill = FillLines::new(self);
        let mut tell = |done, all| {
            self.ranks.enter(done, "image features");
            fill.tell(done, all);
        };
        let data = TrainData::open(self.config, sets, assembly, self.ranks, caches, &mut tell)?;
        let writer = Writer::Evaluations(run_number(self.config, &sets.train));
        let held_out = sets.held_out.as_ref();
        let held_out = held_out.map(|set| HeldOutSet::open(self.config, set, assembly, self.ranks, caches, writer));
        Ok((data, held_out.transpose()?))
    }

    /// Puts what the checkpoint holds into the model and its optimizer; without one the run is at its beginning. All ranks then hold the same.
    pub(super) fn take_up(
        &self,
        checkpoint: Option<&Checkpoint>,
        assembly: &Assembly,
        stepper: &mut Stepper,
        sets: &DataSets,
    ) -> Result<TrainState, Error> {
        let mut state = TrainState::new(self.config.digest(), sets.train.digest());
        let frozen = assembly.frozen_weights();
        if let Some(checkpoint) = checkpoint {
            let Stepper { adamw, scaler, .. } = stepper;
            state = restore(checkpoint, assembly.task.params(), adamw, scaler)?;
            check_frozen(&state.frozen_weights, &frozen)?;
        }
        state.frozen_weights = frozen;
        compare(assembly, &state, self.ranks)?;
        state.held_out_digest = sets.held_out.as_ref().map(|held_out| held_out.digest());
        Ok(state)
    }

    /// A checkpoint must be of the same data.
    fn check_continues(&self, state: &TrainState, sets: &DataSets) -> Result<(), Error> {
        // Without a digest: a checkpoint of before there was one, or of a run without a held-out set.
        let held_out = sets.held_out.as_ref().map(|held_out| held_out.digest());
        let held_out = held_out.or_else(|| state.held_out_digest.clone());
        for (key, same) in [
            ("data.train", state.dataset_digest == sets.train.digest()),
            ("data.val", state.held_out_digest.is_none() || state.held_out_digest == held_out),
        ] {
            if !same {
                return Err(Error::OtherData { key, run: self.name.clone() });
            }
        }
        Ok(())
    }

    /// Takes the folder into use. Only now: whatever was wrong so far left nothing behind that would stand in the way of the corrected run.
    pub(super) fn begin(
        &self,
        (store, folder): (CheckpointStore, RunFolder),
        assembly: &Assembly,
        state: &TrainState,
        going_on: bool,
    ) -> Result<Books, Error> {
        // Also where none is whole: a damaged one of a later step would be kept in the place of those to come.
        store.set_aside_after(state.step)?;
        if going_on {
            self.say(&format!("{}: going on from step {}", self.name, state.step));
        }
        folder.begin(
            self.config,
            Start {
                program_version: env!("CARGO_PKG_VERSION").into(),
                libtorch_version: crate::LIBTORCH_VERSION.into(),
                git_commit: self.request.git_commit.clone(),
                device: device::name(assembly.encoder.device()),
                ranks: self.ranks.world(),
                loaded: assembly.loaded.clone(),
            },
        )?;
        folder.keep_tokenizer(&assembly.tokenizer)?;
        let telemetry = Telemetry::open(TelemetryPlan {
            metrics: folder.metrics(),
            tensorboard: folder.tensorboard(),
            steps: self.config.schedule.steps,
            start: state.step,
            evaluation_due: state.evaluation_due,
            output: (self.request.output)(),
            shown: shown(self.config, assembly, self.ranks.world()),
        })?;
        let quarantine = Quarantine::open(folder.quarantine())?;
        Ok(Books { folder, writer: CheckpointWriter::new(store), telemetry, quarantine })
    }

    /// A line, once for all ranks.
    fn say(&self, line: &str) {
        if self.ranks.is_first() {
            (self.request.say)(line);
        }
    }
}

/// All ranks must hold the same weights.
fn compare(assembly: &Assembly, state: &TrainState, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.world() == 1 {
        return Ok(());
    }
    let mut claims = Claims::default();
    claims.claim("step", state.step.to_string());
    claims.claim("trained weights", format!("{:016x}", weights_checksum(assembly.task.params())));
    for (key, sum) in &state.frozen_weights {
        claims.claim(key, sum);
    }
    claims.compare(ranks)
}

/// Lines about a cache that is being filled.
struct FillLines<'a> {
    opening: &'a Opening<'a>,
    begun: Instant,
    last: Instant,
}

impl<'a> FillLines<'a> {
    fn new(opening: &'a Opening<'a>) -> FillLines<'a> {
        FillLines { opening, begun: Instant::now(), last: Instant::now() }
    }

    fn tell(&mut self, done: u64, all: u64) {
        if self.last.elapsed() < FILL_LINE_EVERY && done < all {
            return;
        }
        self.last = Instant::now();
        let seconds = self.begun.elapsed().as_secs_f64();
        let left_s = seconds / done.max(1) as f64 * (all - done) as f64;
        let (name, rate) = (&self.opening.name, done as f64 / seconds);
        self.opening.say(&format!("{name}: image features {done}/{all} | {rate:.1} images/s | ETA {left_s:.0}s"));
    }
}

/// What the progress line shows, with chance and floor.
fn shown(config: &Config, assembly: &Assembly, world: usize) -> Vec<Shown> {
    let world = if config.task.negatives == NegativeSamples::Local { 1 } else { world };
    // What a loss sees at once: the micro-batches of all ranks.
    let own = config.micro_batch().min(config.schedule.global_batch / world.max(1));
    let names: &[&str] = match config.task.stage {
        Stage::One => &["loss_itc", "loss_itm", "loss_itg"],
        Stage::Two => &["loss_lm"],
    };
    names
        .iter()
        .map(|name| {
            let reference = assembly.task.reference(name, own * world);
            Shown { name: name.to_string(), chance: reference.map(|r| r.chance), floor: reference.map(|r| r.floor) }
        })
        .collect()
}
