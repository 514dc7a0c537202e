//! The training loop: one function that reads from top to bottom, and what it stands on.

mod books;
mod open;

use std::rc::Rc;

use blip2_data::{BAD_WINDOW, BadSamples, Loader, Quarantined};
use blip2_torchx::memory;
use tch::Device;

use crate::assembly::Assembly;
use crate::checkpoint::{Best, Metric, TrainState};
use crate::config::{BestMetric, Config};
use crate::data::TrainData;
use crate::error::Error;
use crate::evaluation::{Evaluation, HeldOutSet};
use crate::meter::Meter;
use crate::ranks::{Ranks, STEPPING, share};
use crate::run_folder;
use crate::schedule::LearningRate;
use crate::signals::StopSignal;
use crate::snapshot::snapshot;
use crate::step::Stepper;
use crate::task::Pass;
use crate::telemetry::Record;
use books::Books;

/// So many non-finite steps in a row end a run.
const MAX_BAD_STEPS: u64 = 10;

/// A stage that is being trained.
pub struct Run {
    config: Config,
    ranks: Rc<dyn Ranks>,
    /// The first rank keeps them for all.
    books: Option<Books>,
    assembly: Assembly,
    data: TrainData,
    held_out: Option<HeldOutSet>,
    stepper: Stepper,
    schedule: LearningRate,
    pass: Pass,
    state: TrainState,
    loader: Loader,
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
        let (steps, ranks) = (self.config.schedule.steps, Rc::clone(&self.ranks));
        let mut stopping = ranks.any(stop.is_set())?;
        ranks.take_traffic(); // what was exchanged so far belongs to no step
        let mut meter = Meter::resume(self.state.unrecorded.clone());
        while self.state.step < steps && !stopping {
            let step = self.state.step;
            let lr = self.schedule.at(step);
            ranks.enter(step, "reading data");
            let host = self.next_batch()?;
            meter.batch(&host, self.loader.last_wait_s());
            self.state.stream_position += self.config.schedule.global_batch as u64;
            ranks.enter(step, STEPPING);
            let micro_batches = self.data.micro_batches(host, &self.assembly.encoder, &*ranks)?;
            let mut metrics = self.stepper.step(&*self.assembly.task, micro_batches, &self.pass, step, lr, &*ranks)?;
            metrics.extend(self.data.take_cache_metrics());
            self.data.take_note().iter().for_each(|line| self.note(line));
            self.state.step = step + 1;
            meter.step(metrics);

            stopping = ranks.any(stop.is_set())?;
            let due = |every: u64| (step + 1).is_multiple_of(every) || step + 1 == steps;
            let log = due(self.config.log.every);
            let evaluate = due(self.config.eval.every) && self.held_out.is_some();
            let save = due(self.config.checkpoint.every) || stopping;
            // Reading the flag of a bad step waits for the device: on CUDA only where the host waits anyway.
            if (self.is_cpu() || log || evaluate || save) && self.handle_bad_step()? {
                meter = Meter::start();
                continue;
            }
            if log {
                self.log(&mut meter, lr)?; // the one host sync of `log.every` steps
            }
            if let Some(books) = &mut self.books {
                books.telemetry.step(self.state.step);
            }
            let best = if evaluate { meter.leave_out(&*ranks, || self.evaluate())? } else { None };
            if save {
                self.save(best, &meter)?;
            }
        }
        self.finish(stopping, &meter)
    }

    fn next_batch(&mut self) -> Result<blip2_data::HostBatch, Error> {
        let host = self.loader.next_batch();
        if host.is_err() {
            let found = self.loader.take_quarantined();
            self.books.as_mut().map_or(Ok(()), |books| books.quarantine(&found))?;
        }
        Ok(host?)
    }

    fn is_cpu(&self) -> bool {
        self.assembly.encoder.device() == Device::Cpu
    }

    /// A line of text, once for all ranks.
    fn note(&mut self, line: &str) {
        if let Some(books) = &mut self.books {
            books.telemetry.note(line);
        }
    }

    fn log(&mut self, meter: &mut Meter, lr: f64) -> Result<(), Error> {
        let step = self.state.step;
        self.ranks.enter(step, "logging");
        let mut scalars = meter.read(&*self.ranks)?;
        scalars.push(("lr".into(), lr));
        scalars.extend(self.data.progress(&self.loader, self.state.stream_position));
        let bad = self.bad_samples()?;
        scalars.push(("quarantined".into(), bad.len() as f64));
        scalars.push(("quarantine_rate".into(), bad.rate(self.state.stream_position, BAD_WINDOW)));
        if let Some(stats) = memory::stats(self.assembly.encoder.device()) {
            scalars.push(("peak_memory_mib".into(), stats.peak_allocated_bytes as f64 / (1 << 20) as f64));
        }
        self.quarantine()?;
        match &mut self.books {
            Some(books) => Ok(books.telemetry.record(&Record::new(step, scalars))?),
            None => Ok(()),
        }
    }

    /// What all ranks have found unreadable.
    fn bad_samples(&self) -> Result<BadSamples, Error> {
        let mut all = BadSamples::default();
        for found in share(&*self.ranks, &self.loader.bad())? {
            all.merge(&found);
        }
        Ok(all)
    }

    /// Writes down the samples that were found unreadable since the last call.
    fn quarantine(&mut self) -> Result<(), Error> {
        let found: Vec<Vec<Quarantined>> = share(&*self.ranks, &self.loader.take_quarantined())?;
        self.books.as_mut().map_or(Ok(()), |books| books.quarantine(&found.concat()))
    }

    /// Measures on held-out data; returns the metric by which the best checkpoint is kept, where there is one.
    fn evaluate(&mut self) -> Result<Option<Metric>, Error> {
        let Some(set) = &self.held_out else { return Ok(None) };
        let step = self.state.step;
        self.ranks.enter(step, "evaluation");
        let task = &self.assembly.task;
        let mut pass = set.pass(&self.assembly.encoder, &self.assembly.text, task.target_rule(), &*self.ranks)?;
        let evaluation: Evaluation = task.evaluate(&mut pass, &self.pass)?;
        let unreadable = pass.take_quarantined()?;
        let Some(books) = &mut self.books else { return Ok(None) };
        books.quarantine(&unreadable)?;
        books.telemetry.record(&Record::new(step, evaluation.scalars.clone()))?;
        if !evaluation.texts.is_empty() {
            books.telemetry.text(step, "val/samples", &evaluation.markdown())?;
            let indices: Vec<u64> = evaluation.texts.iter().map(|t| t.index).collect();
            let (png, width, height) = set.contact_sheet(&indices)?;
            books.telemetry.image(step, "val/pictures", png, width, height)?;
        }
        books.telemetry.note(&summary(step, &evaluation));
        let best = self.config.checkpoint.best;
        // What is not finite is no best, and JSON has no such numbers.
        let value = |best: BestMetric| evaluation.get(best.as_str()).filter(|value| value.is_finite());
        let metric = best.and_then(|best| Some(Metric { name: best.as_str().into(), value: value(best)? }));
        if let (Some(metric), Some(best)) = (&metric, best)
            && self.state.best.as_ref().is_none_or(|b| best.prefers(metric.value, b.metric.value))
        {
            self.state.best = Some(Best { metric: metric.clone(), step });
        }
        Ok(metric)
    }

    /// Writes a checkpoint, which is the same on every rank: the first one writes it.
    fn save(&mut self, metric: Option<Metric>, meter: &Meter) -> Result<(), Error> {
        self.ranks.enter(self.state.step, "checkpoint");
        // Before the checkpoint: behind it these samples are not tried again.
        self.quarantine()?;
        let waiting = self.ranks.waiting("reading metrics");
        self.state.unrecorded = meter.unrecorded();
        drop(waiting);
        let bad = self.bad_samples()?;
        self.state.bad_samples = serde_json::to_value(bad).map_err(|e| Error::Mismatch(e.to_string()))?;
        let Some(books) = &mut self.books else { return Ok(()) };
        self.state.rng = open::generators()?;
        let Stepper { adamw, scaler, .. } = &self.stepper;
        let shot = snapshot(self.assembly.task.params(), adamw, scaler, &self.state, &self.assembly.model_json);
        books.writer.submit(self.state.step, metric, shot)?;
        Ok(())
    }

    /// Records a non-finite step and goes on behind it; true where there was one. All ranks find the same.
    fn handle_bad_step(&mut self) -> Result<bool, Error> {
        let waiting = self.ranks.waiting("reading whether the step was finite");
        let found = self.stepper.take_bad_step();
        drop(waiting);
        let Some(step) = found else { return Ok(false) };
        // On CUDA the host may be some steps ahead: those changed nothing, and are done again.
        let behind = self.state.step - (step + 1);
        let global_batch = self.config.schedule.global_batch as u64;
        self.state.step = step + 1;
        self.state.stream_position -= behind * global_batch;
        let bad = self.loader.bad();
        let position = self.state.stream_position - global_batch;
        let all = run_folder::bad_steps(&self.config);
        let folder = all.join(format!("step_{step:08}"));
        let own = match self.ranks.world() {
            1 => folder.clone(),
            _ => folder.join(format!("rank_{}", self.ranks.rank())),
        };
        crate::bad_step::record(&own, &self.config, &self.assembly, &self.data.batch_with_pixels(position, &bad)?)?;
        if behind > 0 {
            self.loader = self.data.loader(self.state.stream_position, &bad)?;
        }
        self.bad_in_a_row = if self.good_since == step { self.bad_in_a_row + 1 } else { 1 };
        self.good_since = step + 1;
        self.note(&format!("step {step}: not finite, skipped; recorded in {}", folder.display()));
        if self.bad_in_a_row >= MAX_BAD_STEPS {
            return Err(Error::NotFinite { steps: self.bad_in_a_row, step, folder: all });
        }
        Ok(true)
    }

    fn finish(&mut self, stopping: bool, meter: &Meter) -> Result<u64, Error> {
        let (step, steps) = (self.state.step, self.config.schedule.steps);
        // A bad step has no checkpoint of its own, be it the last one or the one that a signal came in.
        let lacks = self.books.as_mut().map_or(Ok(false), |books| books.lacks_checkpoint(step))?;
        if self.ranks.any(lacks)? {
            self.save(None, meter)?;
        }
        if let Some(books) = &mut self.books {
            books.close(step, (!stopping || step == steps).then_some(steps))?;
        }
        // The next stage begins from what the first rank has written.
        self.ranks.any(false)?;
        Ok(step)
    }
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
        let chance = 100.0 * blip2_metrics::chance_recall(recall.k, evaluation.images);
        line += &format!(" | R@{} {i2t:.1}% / {t2i:.1}% (chance {chance:.1}%)", recall.k);
    }
    for text in evaluation.texts.iter().take(3) {
        line += &format!("\n    {} -> {}", text.truth, text.said);
    }
    line
}
