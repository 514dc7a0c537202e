//! From a configuration to a run that is ready for its next step.

use std::rc::Rc;
use std::time::Instant;

use blip2_data::BadSamples;
use blip2_torchx::adamw::{AdamW, AdamWConfig};
use blip2_torchx::device;
use blip2_torchx::grad_scaler::GradScaler;
use blip2_torchx::params::ParamStore;
use tch::{Device, Tensor};

use super::Run;
use super::books::Books;
use crate::assembly::Assembly;
use crate::blueprint::Blueprint;
use crate::checkpoint::{Checkpoint, CheckpointStore, CheckpointWriter, TrainState};
use crate::config::{Config, FeatureCache, NegativeSamples, Precision, Stage};
use crate::data::TrainData;
use crate::error::Error;
use crate::evaluation::HeldOutSet;
use crate::index_lines::{OpeningProgress, SetOpening};
use crate::memory_features::MemoryCaches;
use crate::quarantine::Quarantine;
use crate::ranks::{Claims, Ranks, SHOWN_WITHIN, check_shared, checksum};
use crate::run_folder::{RunFolder, Start};
use crate::schedule::LearningRate;
use crate::snapshot::restore;
use crate::step::Stepper;
use crate::task::Pass;
use crate::telemetry::{Shown, Telemetry, TelemetryPlan};
use crate::train::{Resume, TrainRequest};

/// Progress of a cache that is being filled is said this often.
const FILL_LINE_EVERY_S: u64 = 5;

impl Run {
    /// Opens the folder, builds the stage, and takes up the newest checkpoint where there is one.
    ///
    /// # Errors
    /// A folder in use or of another configuration, weights or data that do not fit, ranks that were started with different things.
    pub fn open(
        config: &Config,
        blueprint: Blueprint,
        request: &TrainRequest,
        ranks: Rc<dyn Ranks>,
        device: Device,
        caches: &mut MemoryCaches,
    ) -> Result<Run, Error> {
        let say = |line: &str| {
            if ranks.is_first() {
                (request.say)(line);
            }
        };
        let mut kept = None;
        if ranks.is_first() {
            let folder = RunFolder::open(config, request.existing())?;
            kept = Some((
                CheckpointStore::open(&folder.checkpoints(), config.checkpoint.keep, config.checkpoint.best)?,
                folder,
            ));
        }
        let patience = request.launch.as_ref().map_or(SHOWN_WITHIN, |launch| launch.meeting.patience.min(SHOWN_WITHIN));
        check_shared(&config.run_folder(), patience, &*ranks)?;
        let store = kept.as_ref().map(|(store, _)| store);
        let checkpoint = agreed_checkpoint(config, store, &request.resume, &*ranks, &say)?;
        let name = config.run_folder().display().to_string();
        say(&format!("{name}: loading models on {}", device::name(device)));
        ranks.enter(0, "loading models");
        let assembly = Assembly::build(config, blueprint, device)?;
        assembly.loaded.iter().for_each(|part| say(&format!("{name}: {part}")));
        let rule = assembly.task.target_rule();
        let mut fill = FillLines::new(&name, &say);
        let mut tell = |done, all| {
            ranks.enter(done, "image features");
            fill.tell(done, all);
        };
        let heard = ranks.is_first().then_some(request.say);
        let sets = SetOpening { say: heard, dry_run: false };
        let progress = OpeningProgress { images: &mut tell, sets };
        let data = TrainData::open(config, &assembly.encoder, &assembly.text, rule, &*ranks, caches, progress)?;
        let held_out = HeldOutSet::open(config, &assembly.encoder, &assembly.text, &*ranks, caches, sets)?;

        let mut stepper = new_stepper(config, &assembly, &*ranks)?;
        let mut state = TrainState::new(config.digest(), data.digest());
        if let Some(checkpoint) = &checkpoint {
            let Stepper { adamw, scaler, .. } = &mut stepper;
            state = restore(checkpoint, assembly.task.params(), adamw, scaler)?;
            // Without a digest: a checkpoint of before there was one, or of a run without a held-out set.
            let held_out = held_out.as_ref().map(HeldOutSet::digest).or_else(|| state.held_out_digest.clone());
            for (key, same) in [
                ("data.train", state.dataset_digest == data.digest()),
                ("data.val", state.held_out_digest.is_none() || state.held_out_digest == held_out),
            ] {
                if !same {
                    return Err(Error::Mismatch(format!(
                        "{key}: other shards than the run began with, or other samples of them that pass the filter; give the same, or begin a new run under another run.name ({name})"
                    )));
                }
            }
            if matches!(request.resume, Resume::Path(_)) && state.config_digest != config.digest() {
                return Err(Error::Mismatch(format!(
                    "{}: expected a checkpoint of this configuration, got one of another; name its weights in model.qformer.init of a new run to begin from them",
                    checkpoint.path().display()
                )));
            }
        }
        compare(&assembly, &state, &*ranks)?;
        state.held_out_digest = held_out.as_ref().map(HeldOutSet::digest);
        let loader = data.loader(state.stream_position, &state.bad_samples)?;
        let mut books = None;
        if let Some((store, folder)) = kept {
            // Also where none is whole: a damaged one of a later step would be kept in the place of those to come.
            store.set_aside_after(state.step)?;
            if checkpoint.is_some() {
                say(&format!("{name}: going on from step {}", state.step));
            }
            books = Some(begin(config, request, &assembly, (store, folder), &state, &*ranks)?);
        }
        let mut run = Run {
            schedule: LearningRate::new(&config.optimizer, &config.schedule),
            pass: pass(config),
            bad_in_a_row: 0,
            good_since: u64::MAX,
            config: config.clone(),
            ranks,
            books,
            assembly,
            data,
            held_out,
            stepper,
            state,
            loader,
        };
        run.introduce()?;
        Ok(run)
    }

    /// Builds the stage, runs one batch forward and backward and reads one that is held out; writes nothing but, into the folder that `config`
    /// names, the indices of shards that have none. Returns a line about it.
    ///
    /// # Errors
    /// Everything that would stop the run before its first step.
    pub fn try_one_batch(
        config: &Config,
        blueprint: Blueprint,
        device: Device,
        ranks: &dyn Ranks,
    ) -> Result<String, Error> {
        let assembly = Assembly::build(config, blueprint, device)?;
        let mut one = config.clone();
        one.data.feature_cache = FeatureCache::Off;
        let rule = assembly.task.target_rule();
        let (encoder, text) = (&assembly.encoder, &assembly.text);
        let sets = SetOpening { say: None, dry_run: true };
        let progress = OpeningProgress { images: &mut |_, _| {}, sets };
        let data = TrainData::open(&one, encoder, text, rule, ranks, &mut MemoryCaches::default(), progress)?;
        HeldOutSet::open(&one, encoder, text, ranks, &mut MemoryCaches::default(), sets)?;
        let host = data.loader(0, &BadSamples::default())?.next_batch()?;
        let mut stepper = new_stepper(config, &assembly, ranks)?;
        let micro_batches = data.micro_batches(host, encoder, ranks)?;
        let metrics = stepper.step(&*assembly.task, micro_batches, &pass(config), 0, 0.0, ranks)?;
        let values: Vec<String> = metrics.iter().map(|(n, t)| format!("{n} {:.4}", t.double_value(&[]))).collect();
        let trained = assembly.task.params().num_elements();
        Ok(format!(
            "config, weights and data are good; {trained} trainable parameters, {} samples; first batch: {}",
            data.samples(),
            values.join(", ")
        ))
    }

    /// Logs what is fixed for the whole run.
    fn introduce(&mut self) -> Result<(), Error> {
        let Some(books) = &mut self.books else { return Ok(()) };
        books.quarantine(&self.data.problems())?;
        books.quarantine(self.data.quarantined())?;
        if let Some(held_out) = &self.held_out {
            books.quarantine(&held_out.problems())?;
            books.quarantine(held_out.quarantined())?;
        }
        self.data.filters().iter().for_each(|line| books.telemetry.note(line));
        self.data.cache_introduction().iter().for_each(|line| books.telemetry.note(line));
        let ranks = match self.ranks.world() {
            1 => String::new(),
            world => format!(", {world} ranks"),
        };
        books.telemetry.note(&format!(
            "{}: {} trainable parameters, {} samples{ranks}",
            books.folder.path().display(),
            self.assembly.task.params().num_elements(),
            self.data.samples(),
        ));
        Ok(())
    }
}

/// Takes the folder into use. Only now: whatever was wrong so far left nothing behind that would stand in the way of the corrected run.
fn begin(
    config: &Config,
    request: &TrainRequest,
    assembly: &Assembly,
    (store, folder): (CheckpointStore, RunFolder),
    state: &TrainState,
    ranks: &dyn Ranks,
) -> Result<Books, Error> {
    folder.begin(
        config,
        Start {
            program_version: env!("CARGO_PKG_VERSION").into(),
            libtorch_version: crate::LIBTORCH_VERSION.into(),
            git_commit: request.git_commit.clone(),
            device: device::name(assembly.encoder.device()),
            ranks: ranks.world(),
            loaded: assembly.loaded.clone(),
        },
    )?;
    folder.keep_tokenizer(&assembly.tokenizer)?;
    let telemetry = Telemetry::open(TelemetryPlan {
        metrics: folder.metrics(),
        tensorboard: folder.tensorboard(),
        steps: config.schedule.steps,
        start: state.step,
        evaluation_due: state.evaluation_due,
        output: (request.output)(),
        shown: shown(config, assembly, ranks.world()),
    })?;
    let quarantine = Quarantine::open(folder.quarantine())?;
    Ok(Books { folder, writer: CheckpointWriter::new(store), telemetry, quarantine })
}

/// The checkpoint that the first rank chooses, opened by all.
fn agreed_checkpoint(
    config: &Config,
    store: Option<&CheckpointStore>,
    resume: &Resume,
    ranks: &dyn Ranks,
    say: &dyn Fn(&str),
) -> Result<Option<Checkpoint>, Error> {
    let found = store.map_or(Ok(None), |store| find_checkpoint(store, resume, say))?;
    let step = found.as_ref().map_or(u64::MAX, Checkpoint::step);
    let step = ranks.share_numbers(&[step])?[0][0];
    if ranks.is_first() || step == u64::MAX {
        return Ok(found);
    }
    let path = match resume {
        Resume::Path(path) => path.clone(),
        Resume::Auto | Resume::Never => {
            CheckpointStore::read_only(&config.run_folder().join("checkpoints"), None).path(step)
        }
    };
    let lacks = |error| {
        Error::Mismatch(format!(
            "rank {} cannot read the checkpoint that rank 0 goes on from: {error}; run.dir must be a folder that all hosts share",
            ranks.rank()
        ))
    };
    Checkpoint::open(&path).map(Some).map_err(lacks)
}

/// All ranks must hold the same weights.
fn compare(assembly: &Assembly, state: &TrainState, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.world() == 1 {
        return Ok(());
    }
    let mut claims = Claims::default();
    claims.claim("step", state.step.to_string());
    claims.claim("trained weights", format!("{:016x}", checksum(&tensors(assembly.task.params()))));
    for (name, params) in assembly.frozen() {
        claims.claim(name, format!("{:016x}", checksum(&tensors(params))));
    }
    claims.compare(ranks)
}

fn tensors(params: &ParamStore) -> Vec<Tensor> {
    params.entries().into_iter().map(|(_, tensor, _)| tensor).collect()
}

/// Lines about a cache that is being filled.
struct FillLines<'a> {
    name: &'a str,
    say: &'a dyn Fn(&str),
    begun: Instant,
    last: Instant,
}

impl<'a> FillLines<'a> {
    fn new(name: &'a str, say: &'a dyn Fn(&str)) -> FillLines<'a> {
        FillLines { name, say, begun: Instant::now(), last: Instant::now() }
    }

    fn tell(&mut self, done: u64, all: u64) {
        if self.last.elapsed().as_secs() < FILL_LINE_EVERY_S && done < all {
            return;
        }
        self.last = Instant::now();
        let seconds = self.begun.elapsed().as_secs_f64();
        let left_s = seconds / done.max(1) as f64 * (all - done) as f64;
        let rate = done as f64 / seconds;
        (self.say)(&format!("{}: image features {done}/{all} | {rate:.1} images/s | ETA {left_s:.0}s", self.name));
    }
}

fn find_checkpoint(store: &CheckpointStore, resume: &Resume, say: &dyn Fn(&str)) -> Result<Option<Checkpoint>, Error> {
    match resume {
        Resume::Path(path) => Ok(Some(Checkpoint::open(path)?)),
        Resume::Never => Ok(None),
        Resume::Auto => {
            let newest = store.newest()?;
            for rejected in &newest.rejected {
                say(&format!("{}: damaged, passed over: {}", rejected.path.display(), rejected.reason));
            }
            if newest.checkpoint.is_none() && !newest.rejected.is_empty() {
                say("no whole checkpoint is left: the run begins anew, and the damaged ones are set aside");
            }
            Ok(newest.checkpoint)
        }
    }
}

fn new_stepper(config: &Config, assembly: &Assembly, ranks: &dyn Ranks) -> Result<Stepper, Error> {
    let o = &config.optimizer;
    let adamw = AdamWConfig { betas: (o.betas[0], o.betas[1]), eps: o.eps, weight_decay: o.weight_decay };
    let params = assembly.task.params();
    let scaler = GradScaler::new(params.device(), config.run.precision == Precision::Fp16);
    let gradients = ranks.gradients(params, config.run.gradient_exchange)?;
    Ok(Stepper::new(AdamW::new(params.entries(), adamw), scaler, gradients, params, o.clip_norm))
}

fn pass(config: &Config) -> Pass {
    Pass { autocast: config.run.precision.autocast(), dropout: config.model.qformer.dropout, seed: config.run.seed }
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
