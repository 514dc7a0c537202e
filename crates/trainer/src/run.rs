//! The training loop: one function that reads from top to bottom, and what it stands on.

use std::collections::BTreeMap;
use std::time::Instant;

use blip2_data::{BadSamples, Loader};
use blip2_torchx::adamw::{AdamW, AdamWConfig};
use blip2_torchx::grad_scaler::GradScaler;
use blip2_torchx::{device, memory, rng};
use tch::Device;

use crate::assembly::Assembly;
use crate::blueprint::Blueprint;
use crate::checkpoint::{Best, Checkpoint, CheckpointStore, CheckpointWriter, Metric, RngState, TrainState};
use crate::config::{Config, Precision, Stage};
use crate::data::TrainData;
use crate::error::Error;
use crate::evaluation::{Evaluation, HeldOutSet};
use crate::features::MemoryCaches;
use crate::meter::Meter;
use crate::quarantine;
use crate::run_folder::{Existing, RunFolder, Start};
use crate::schedule::LearningRate;
use crate::signals::StopSignal;
use crate::snapshot::{restore, snapshot};
use crate::step::Stepper;
use crate::task::Pass;
use crate::telemetry::{Record, Shown, Telemetry, TelemetryPlan};
use crate::train::{Resume, TrainRequest};

/// So many non-finite steps in a row end a run.
const MAX_BAD_STEPS: u64 = 10;
/// Progress of a cache that is being filled is said this often.
const FILL_LINE_EVERY_S: u64 = 5;

/// A stage that is being trained.
pub struct Run {
    config: Config,
    folder: RunFolder,
    assembly: Assembly,
    data: TrainData,
    held_out: Option<HeldOutSet>,
    stepper: Stepper,
    schedule: LearningRate,
    pass: Pass,
    state: TrainState,
    loader: Loader,
    writer: CheckpointWriter,
    telemetry: Telemetry,
    bad_in_a_row: u64,
    /// The step behind the last bad one.
    good_since: u64,
}

impl Run {
    /// Trains until the last step or a signal; returns the steps done.
    ///
    /// # Errors
    /// Whatever stops the run; the last checkpoint stays valid.
    pub fn train(&mut self, stop: &StopSignal) -> Result<u64, Error> {
        let steps = self.config.schedule.steps;
        let mut meter = Meter::resume(self.state.unrecorded.clone());
        while self.state.step < steps && !stop.is_set() {
            let step = self.state.step;
            let lr = self.schedule.at(step);
            let host = self.loader.next_batch();
            if host.is_err() {
                self.quarantine()?;
            }
            let host = host?;
            meter.batch(&host, self.loader.last_wait_s());
            self.state.stream_position = host.position + host.size as u64;
            let micro_batches = self.data.micro_batches(host, &self.assembly.encoder);
            let mut metrics = self.stepper.step(&*self.assembly.task, micro_batches, &self.pass, step, lr)?;
            metrics.extend(self.data.take_cache_metrics());
            self.data.take_note().iter().for_each(|line| self.telemetry.note(line));
            self.state.step = step + 1;
            meter.step(metrics);

            let due = |every: u64| (step + 1).is_multiple_of(every) || step + 1 == steps;
            let log = due(self.config.log.every);
            let evaluate = due(self.config.eval.every) && self.held_out.is_some();
            let save = due(self.config.checkpoint.every) || stop.is_set();
            // Reading the flag of a bad step waits for the device: on CUDA only where the host waits anyway.
            if (self.is_cpu() || log || evaluate || save) && self.handle_bad_step()? {
                meter = Meter::start();
                continue;
            }
            if log {
                self.log(&mut meter, lr)?; // the one host sync of `log.every` steps
            }
            self.telemetry.step(self.state.step);
            let begun = Instant::now();
            let best = if evaluate { self.evaluate()? } else { None };
            meter.pause(begun.elapsed());
            if save {
                self.save(best, &meter)?;
            }
        }
        self.finish(stop, &meter)
    }

    /// Opens the folder, builds the stage, and takes up the newest checkpoint where there is one.
    ///
    /// # Errors
    /// A folder in use or of another configuration, weights or data that do not fit.
    pub fn open(
        config: &Config,
        blueprint: Blueprint,
        request: &TrainRequest,
        device: Device,
        caches: &mut MemoryCaches,
    ) -> Result<Run, Error> {
        let existing = if request.resume == Resume::Never { Existing::Refuse } else { Existing::Continue };
        let folder = RunFolder::open(config, existing)?;
        let store = CheckpointStore::open(&folder.checkpoints(), config.checkpoint.keep, config.checkpoint.best)?;
        let checkpoint = find_checkpoint(&store, &request.resume, request.say)?;
        let name = folder.path().display().to_string();
        (request.say)(&format!("{name}: loading models on {}", device::name(device)));
        let assembly = Assembly::build(config, blueprint, device)?;
        assembly.loaded.iter().for_each(|part| (request.say)(&format!("{name}: {part}")));
        let rule = assembly.task.target_rule();
        let mut fill = FillLines::new(&name, request.say);
        let mut tell = |done, all| fill.tell(done, all);
        let data = TrainData::open(config, &assembly.encoder, &assembly.text, rule, caches, &mut tell)?;
        let held_out = HeldOutSet::open(config, &assembly.encoder, &assembly.text, caches)?;

        let mut stepper = new_stepper(config, &assembly);
        let mut state = TrainState::new(config.digest(), data.digest());
        if let Some(checkpoint) = &checkpoint {
            let Stepper { adamw, scaler, .. } = &mut stepper;
            state = restore(checkpoint, assembly.task.params(), adamw, scaler)?;
            set_generators(&state, device)?;
            if state.dataset_digest != data.digest() {
                return Err(Error::Mismatch(format!(
                    "data.train: other shards than the run began with; give the same shards, or begin a new run under another run.name ({name})"
                )));
            }
            if matches!(request.resume, Resume::Path(_)) && state.config_digest != config.digest() {
                return Err(Error::Mismatch(format!(
                    "{}: expected a checkpoint of this configuration, got one of another; name its weights in model.qformer.init of a new run to begin from them",
                    checkpoint.path().display()
                )));
            }
            store.set_aside_after(state.step)?;
            (request.say)(&format!("{name}: going on from step {}", state.step));
        }
        let bad = match &state.bad_samples {
            serde_json::Value::Null => BadSamples::default(),
            list => serde_json::from_value(list.clone())
                .map_err(|e| Error::Mismatch(format!("state.json: bad_samples: {e}")))?,
        };
        let loader = data.loader(state.stream_position, &bad)?;
        // Only now: whatever was wrong so far left nothing behind that would stand in the way of the corrected run.
        folder.begin(
            config,
            Start {
                program_version: env!("CARGO_PKG_VERSION").into(),
                libtorch_version: crate::LIBTORCH_VERSION.into(),
                git_commit: request.git_commit.clone(),
                device: device::name(device),
                loaded: assembly.loaded.clone(),
            },
        )?;
        folder.keep_tokenizer(&assembly.tokenizer)?;
        let telemetry = Telemetry::open(TelemetryPlan {
            metrics: folder.metrics(),
            tensorboard: folder.tensorboard(),
            steps: config.schedule.steps,
            start: state.step,
            output: (request.output)(),
            shown: shown(config, &assembly),
        })?;
        let mut run = Run {
            schedule: LearningRate::new(&config.optimizer, &config.schedule),
            pass: pass(config),
            writer: CheckpointWriter::new(store),
            bad_in_a_row: 0,
            good_since: u64::MAX,
            config: config.clone(),
            folder,
            assembly,
            data,
            held_out,
            stepper,
            state,
            loader,
            telemetry,
        };
        run.introduce()?;
        Ok(run)
    }

    /// Builds the stage and runs one batch forward and backward; writes nothing. Returns a line about it.
    ///
    /// # Errors
    /// Everything that would stop the run before its first step.
    pub fn try_one_batch(config: &Config, blueprint: Blueprint, device: Device) -> Result<String, Error> {
        let assembly = Assembly::build(config, blueprint, device)?;
        let mut one = config.clone();
        one.data.feature_cache = crate::config::FeatureCache::Off;
        let rule = assembly.task.target_rule();
        let data = TrainData::open(
            &one,
            &assembly.encoder,
            &assembly.text,
            rule,
            &mut MemoryCaches::default(),
            &mut |_, _| {},
        )?;
        let host = data.loader(0, &BadSamples::default())?.next_batch()?;
        let mut stepper = new_stepper(config, &assembly);
        let micro_batches = data.micro_batches(host, &assembly.encoder);
        let metrics = stepper.step(&*assembly.task, micro_batches, &pass(config), 0, 0.0)?;
        let values: Vec<String> = metrics.iter().map(|(n, t)| format!("{n} {:.4}", t.double_value(&[]))).collect();
        let trained = assembly.task.params().num_elements();
        Ok(format!(
            "{}: config, weights and data are good; {trained} trainable parameters, {} samples; first batch: {}",
            config.run_folder().display(),
            data.samples(),
            values.join(", ")
        ))
    }

    /// Logs what is fixed for the whole run.
    fn introduce(&mut self) -> Result<(), Error> {
        let path = self.folder.quarantine();
        let lines =
            [quarantine::append(&path, &self.data.problems())?, quarantine::append(&path, self.data.quarantined())?];
        lines.iter().flatten().for_each(|line| self.telemetry.note(line));
        self.data.filters().iter().for_each(|line| self.telemetry.note(line));
        self.data.cache_introduction().iter().for_each(|line| self.telemetry.note(line));
        self.telemetry.note(&format!(
            "{}: {} trainable parameters, {} samples",
            self.folder.path().display(),
            self.assembly.task.params().num_elements(),
            self.data.samples(),
        ));
        Ok(())
    }

    fn is_cpu(&self) -> bool {
        self.assembly.encoder.device() == Device::Cpu
    }

    fn log(&mut self, meter: &mut Meter, lr: f64) -> Result<(), Error> {
        let step = self.state.step;
        let mut scalars = meter.read();
        scalars.push(("lr".into(), lr));
        scalars.extend(self.data.progress(&self.loader, self.state.stream_position));
        scalars.push(("quarantined".into(), self.loader.bad().len() as f64));
        if let Some(stats) = memory::stats(self.assembly.encoder.device()) {
            scalars.push(("peak_memory_mib".into(), stats.peak_allocated_bytes as f64 / (1 << 20) as f64));
        }
        self.quarantine()?;
        self.telemetry.record(&Record::new(step, scalars))?;
        Ok(())
    }

    /// Writes down the samples that were found unreadable since the last call.
    fn quarantine(&mut self) -> Result<(), Error> {
        if let Some(line) = quarantine::append(&self.folder.quarantine(), &self.loader.take_quarantined())? {
            self.telemetry.note(&line);
        }
        Ok(())
    }

    /// Measures on held-out data; returns the metric by which the best checkpoint is kept, where there is one.
    fn evaluate(&mut self) -> Result<Option<Metric>, Error> {
        let Some(set) = &self.held_out else { return Ok(None) };
        let step = self.state.step;
        let task = &self.assembly.task;
        let mut pass = set.pass(&self.assembly.encoder, &self.assembly.text, task.target_rule())?;
        let evaluation: Evaluation = task.evaluate(&mut pass, &self.pass)?;
        self.telemetry.record(&Record::new(step, evaluation.scalars.clone()))?;
        if !evaluation.texts.is_empty() {
            self.telemetry.text(step, "val/samples", &evaluation.markdown())?;
            let indices: Vec<u64> = evaluation.texts.iter().map(|t| t.index).collect();
            let (png, width, height) = set.contact_sheet(&indices)?;
            self.telemetry.image(step, "val/pictures", png, width, height)?;
        }
        self.telemetry.note(&summary(step, &evaluation));
        let best = self.config.checkpoint.best;
        let metric = best.and_then(|b| Some(Metric { name: b.as_str().into(), value: evaluation.get(b.as_str())? }));
        if let (Some(metric), Some(best)) = (&metric, best)
            && self.state.best.as_ref().is_none_or(|b| best.prefers(metric.value, b.metric.value))
        {
            self.state.best = Some(Best { metric: metric.clone(), step });
        }
        Ok(metric)
    }

    fn save(&mut self, metric: Option<Metric>, meter: &Meter) -> Result<(), Error> {
        // Before the checkpoint: behind it these samples are not tried again.
        self.quarantine()?;
        self.state.unrecorded = meter.unrecorded();
        self.state.bad_samples = serde_json::to_value(self.loader.bad()).map_err(|e| Error::Mismatch(e.to_string()))?;
        self.state.rng = generators(self.assembly.encoder.device())?;
        let Stepper { adamw, scaler, .. } = &self.stepper;
        let shot = snapshot(self.assembly.task.params(), adamw, scaler, &self.state, &self.assembly.model_json);
        self.writer.submit(self.state.step, metric, shot)?;
        Ok(())
    }

    /// Records a non-finite step and goes on behind it; true where there was one.
    fn handle_bad_step(&mut self) -> Result<bool, Error> {
        let Some(step) = self.stepper.take_bad_step() else { return Ok(false) };
        // On CUDA the host may be some steps ahead: those changed nothing, and are done again.
        let behind = self.state.step - (step + 1);
        let global_batch = self.config.schedule.global_batch as u64;
        self.state.step = step + 1;
        self.state.stream_position -= behind * global_batch;
        let bad = self.loader.bad();
        let position = self.state.stream_position - global_batch;
        let folder = crate::bad_step::record(
            &self.folder.bad_steps().join(format!("step_{step:08}")),
            &self.config,
            &self.assembly,
            &self.data.batch_with_pixels(position, &bad)?,
        )?;
        if behind > 0 {
            self.loader = self.data.loader(self.state.stream_position, &bad)?;
        }
        self.bad_in_a_row = if self.good_since == step { self.bad_in_a_row + 1 } else { 1 };
        self.good_since = step + 1;
        self.telemetry.note(&format!("step {step}: not finite, skipped; recorded in {}", folder.display()));
        if self.bad_in_a_row >= MAX_BAD_STEPS {
            return Err(Error::NotFinite { steps: self.bad_in_a_row, step, folder: self.folder.bad_steps() });
        }
        Ok(true)
    }

    fn finish(&mut self, stop: &StopSignal, meter: &Meter) -> Result<u64, Error> {
        let (step, steps) = (self.state.step, self.config.schedule.steps);
        self.writer.wait()?;
        // A bad step has no checkpoint of its own, be it the last one or the one that a signal came in.
        if step > 0 && !self.writer.store().steps()?.contains(&step) {
            self.save(None, meter)?;
            self.writer.wait()?;
        }
        if stop.is_set() && step < steps {
            self.telemetry.note(&format!("stopped after step {step}; the same command goes on from there"));
        } else {
            self.folder.mark_finished(steps)?;
        }
        self.telemetry.sync()?;
        Ok(step)
    }
}

/// Lines about a cache that is being filled.
struct FillLines<'a> {
    name: &'a str,
    say: fn(&str),
    begun: Instant,
    last: Instant,
}

impl<'a> FillLines<'a> {
    fn new(name: &'a str, say: fn(&str)) -> FillLines<'a> {
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

fn find_checkpoint(store: &CheckpointStore, resume: &Resume, say: fn(&str)) -> Result<Option<Checkpoint>, Error> {
    match resume {
        Resume::Path(path) => Ok(Some(Checkpoint::open(path)?)),
        Resume::Never => Ok(None),
        Resume::Auto => {
            let newest = store.newest()?;
            for rejected in &newest.rejected {
                say(&format!("{}: damaged, the one before is taken: {}", rejected.path.display(), rejected.reason));
            }
            Ok(newest.checkpoint)
        }
    }
}

fn new_stepper(config: &Config, assembly: &Assembly) -> Stepper {
    let o = &config.optimizer;
    let adamw = AdamWConfig { betas: (o.betas[0], o.betas[1]), eps: o.eps, weight_decay: o.weight_decay };
    let params = assembly.task.params();
    let scaler = GradScaler::new(params.device(), config.run.precision == Precision::Fp16);
    Stepper::new(AdamW::new(params.entries(), adamw), scaler, params, o.clip_norm)
}

fn pass(config: &Config) -> Pass {
    Pass { autocast: config.run.precision.autocast(), dropout: config.model.qformer.dropout, seed: config.run.seed }
}

/// States of the generators that a run draws from: the CPU's, and the GPU's, which dropout uses there.
fn generators(device: Device) -> Result<BTreeMap<String, RngState>, Error> {
    let devices = if device == Device::Cpu { vec![Device::Cpu] } else { vec![Device::Cpu, device] };
    let state = |d: Device| Ok((generator_name(d).to_string(), RngState(rng::state(d)?)));
    devices.into_iter().map(state).collect()
}

fn set_generators(state: &TrainState, device: Device) -> Result<(), Error> {
    for d in [Device::Cpu, device] {
        if let Some(RngState(bytes)) = state.rng.get(generator_name(d)) {
            rng::set_state(d, bytes)?;
        }
    }
    Ok(())
}

fn generator_name(device: Device) -> &'static str {
    if device == Device::Cpu { "cpu" } else { "cuda" }
}

/// What the progress line shows, with chance and floor.
fn shown(config: &Config, assembly: &Assembly) -> Vec<Shown> {
    let names: &[&str] = match config.task.stage {
        Stage::One => &["loss_itc", "loss_itm", "loss_itg"],
        Stage::Two => &["loss_lm"],
    };
    names
        .iter()
        .map(|name| {
            let reference = assembly.task.reference(name, config.micro_batch());
            Shown { name: name.to_string(), chance: reference.map(|r| r.chance), floor: reference.map(|r| r.floor) }
        })
        .collect()
}

/// One line about an evaluation.
fn summary(step: u64, evaluation: &Evaluation) -> String {
    let losses = evaluation.scalars.iter().filter(|(n, _)| n.starts_with("val_loss"));
    let mut line = format!("step {step}: held out");
    for (name, value) in losses {
        line += &format!(" | {name} {value:.3}");
    }
    for recall in &evaluation.recall {
        let (i2t, t2i) = (100.0 * recall.image_to_text, 100.0 * recall.text_to_image);
        let chance = 100.0 * blip2_metrics::chance_recall(recall.k, evaluation.samples);
        line += &format!(" | R@{} {i2t:.1}% / {t2i:.1}% (chance {chance:.1}%)", recall.k);
    }
    for text in evaluation.texts.iter().take(3) {
        line += &format!("\n    {} -> {}", text.truth, text.said);
    }
    line
}

impl Drop for Run {
    /// A checkpoint in flight is written to its end, however the run ends.
    fn drop(&mut self) {
        let _ = self.writer.wait();
    }
}
