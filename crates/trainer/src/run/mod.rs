//! The training loop: one function that reads from top to bottom, and what it stands on.

mod bad_step;
mod books;
pub(crate) mod folder;
pub(crate) mod meter;
mod open;
mod opening;
mod quarantine;
pub(crate) mod schedule;
pub(crate) mod signals;

use std::rc::Rc;

use blip2_data::{BAD_WINDOW, Loader, Quarantined};
use blip2_torchx::memory;
use tch::Device;

use crate::assembly::Assembly;
use crate::checkpoint::snapshot::snapshot;
use crate::checkpoint::{Best, Metric, TrainState};
use crate::config::{BestMetric, Config, FeatureCache};
use crate::data::TrainData;
use crate::error::Error;
use crate::evaluation::{Evaluation, HeldOutSet, one_line};
use crate::ranks::{Ranks, STEPPING, share};
use crate::run::meter::Meter;
use crate::run::schedule::LearningRate;
use crate::run::signals::StopSignal;
use crate::step::Stepper;
use crate::task::ForwardOptions;
use crate::telemetry::Record;
use books::Books;

/// So many non-finite steps in a row end a run.
const MAX_BAD_STEPS: u64 = 10;

/// What comes of an evaluation.
enum Evaluated {
    /// The metric by which the best checkpoint is kept, where there is one.
    Whole(Option<Metric>),
    /// Nothing: a signal came. It is made up when the run goes on.
    CutShort,
}

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
    forward: ForwardOptions,
    state: TrainState,
    loader: Loader,
    bad_in_a_row: u64,
    /// The step behind the last bad one.
    good_since: u64,
}

impl Run {
    /// Trains until the last step or a signal; returns the steps done, and whether that is all of the run.
    ///
    /// # Errors
    /// Whatever stops the run; the last checkpoint stays valid.
    pub fn train(&mut self, stop: &StopSignal) -> Result<(u64, bool), Error> {
        let (steps, ranks) = (self.config.schedule.steps, Rc::clone(&self.ranks));
        let mut stopping = ranks.any(stop.is_set())?;
        ranks.take_traffic(); // what was exchanged so far belongs to no step
        let mut meter = Meter::resume(self.state.unrecorded.clone());
        if self.state.evaluation_due && !stopping {
            stopping = !self.make_up_evaluation(&mut meter, stop)?;
        }
        while self.state.step < steps && !stopping {
            let step = self.state.step;
            let lr = self.schedule.at(step);
            ranks.enter(step, "reading data");
            let host = self.next_batch()?;
            meter.batch(&host, self.loader.last_wait_s());
            self.state.stream_position += self.config.schedule.global_batch as u64;
            ranks.enter(step, STEPPING);
            let micro_batches = self.data.micro_batches(host, &self.assembly.encoder, &*ranks)?;
            let mut metrics =
                self.stepper.step(&*self.assembly.task, micro_batches, &self.forward, step, lr, &*ranks)?;
            metrics.extend(self.data.take_cache_metrics());
            self.state.step = step + 1;
            meter.step(metrics);

            stopping = ranks.any(stop.is_set())?;
            let log = self.is_due(self.config.log.every);
            let evaluate = self.is_due(self.config.eval.every) && self.held_out.is_some();
            let save = self.is_due(self.config.checkpoint.every) || stopping;
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
                // A disk that is full is told now, not at the next checkpoint.
                books.writer.poll().transpose()?;
            }
            let mut best = None;
            if evaluate {
                match meter.leave_out(&*ranks, || self.evaluate(stop))? {
                    Evaluated::Whole(metric) => best = metric,
                    Evaluated::CutShort => (stopping, self.state.evaluation_due) = (true, true),
                }
            }
            if save || stopping {
                self.save(best, &meter)?;
            }
        }
        self.finish(stopping, &meter)
    }

    /// Whether something that is done every so many steps is due behind the last one.
    fn is_due(&self, every: u64) -> bool {
        self.state.step.is_multiple_of(every) || self.state.step == self.config.schedule.steps
    }

    /// Does what a signal came before, so that the run goes on as if none had come; false where the next one came.
    fn make_up_evaluation(&mut self, meter: &mut Meter, stop: &StopSignal) -> Result<bool, Error> {
        let ranks = Rc::clone(&self.ranks);
        let Evaluated::Whole(best) = meter.leave_out(&*ranks, || self.evaluate(stop))? else { return Ok(false) };
        self.state.evaluation_due = false;
        // A checkpoint that is there for the signal's sake alone is not kept as the best.
        let best = best.filter(|_| self.is_due(self.config.checkpoint.every));
        self.save(best, meter)?;
        Ok(true)
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
        for line in self.notes_of_ranks(self.data.take_note())? {
            self.note(&line);
        }
        let mut scalars = meter.read(&*self.ranks)?;
        scalars.push(("lr".into(), lr));
        scalars.extend(self.data.progress(&self.loader, self.state.stream_position));
        self.share_found()?;
        scalars.push(("quarantined".into(), (self.state.bad_samples.len() + self.data.quarantined().len()) as f64));
        scalars.push(("quarantine_rate".into(), self.state.bad_samples.rate(self.state.stream_position, BAD_WINDOW)));
        if let Some(stats) = memory::stats(self.assembly.encoder.device()) {
            scalars.push(("peak_memory_mib".into(), stats.peak_allocated_bytes as f64 / (1 << 20) as f64));
        }
        self.quarantine()?;
        match &mut self.books {
            Some(books) => Ok(books.telemetry.record(&Record::new(step, scalars))?),
            None => Ok(()),
        }
    }

    /// What ranks have to say of a feature cache on disk.
    fn notes_of_ranks(&self, own: Option<String>) -> Result<Vec<String>, Error> {
        match self.config.data.feature_cache {
            FeatureCache::Directory(_) => Ok(lines_of_ranks(&share(&*self.ranks, &own)?)),
            FeatureCache::Off | FeatureCache::Memory => Ok(Vec::new()),
        }
    }

    /// Adds to the list what any rank has found unreadable since the last call.
    fn share_found(&mut self) -> Result<(), Error> {
        for found in share(&*self.ranks, &self.loader.take_found())? {
            self.state.bad_samples.merge(&found);
        }
        Ok(())
    }

    /// Writes down the samples that were found unreadable since the last call.
    fn quarantine(&mut self) -> Result<(), Error> {
        let found: Vec<Vec<Quarantined>> = share(&*self.ranks, &self.loader.take_quarantined())?;
        self.books.as_mut().map_or(Ok(()), |books| books.quarantine(&found.concat()))
    }

    /// Measures on held-out data, unless a signal came or comes: whoever asks to stop seldom has the time that it takes.
    fn evaluate(&mut self, stop: &StopSignal) -> Result<Evaluated, Error> {
        let Some(set) = &self.held_out else { return Ok(Evaluated::Whole(None)) };
        let step = self.state.step;
        self.ranks.enter(step, "evaluation");
        if self.ranks.any(stop.is_set())? {
            return Ok(Evaluated::CutShort);
        }
        let mut pass = set.pass(&self.assembly, &*self.ranks, self.state.stream_position)?.until(stop);
        let mut evaluation: Evaluation = self.assembly.task.evaluate(&mut pass, &self.forward)?;
        if pass.was_cut_short()? {
            return Ok(Evaluated::CutShort);
        }
        let unreadable = pass.take_quarantined()?;
        evaluation.scalars.extend(set.take_cache_metrics(&*self.ranks)?);
        let notes = self.notes_of_ranks(set.take_note())?;
        let Some(books) = &mut self.books else { return Ok(Evaluated::Whole(None)) };
        books.quarantine(&unreadable)?;
        notes.iter().for_each(|line| books.telemetry.note(line));
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
        Ok(Evaluated::Whole(metric))
    }

    /// Writes a checkpoint, which is the same on every rank: the first one writes it.
    fn save(&mut self, metric: Option<Metric>, meter: &Meter) -> Result<(), Error> {
        self.ranks.enter(self.state.step, "checkpoint");
        // Before the checkpoint: behind it these samples are not tried again.
        self.quarantine()?;
        let waiting = self.ranks.waiting("reading metrics");
        let unrecorded = meter.unrecorded();
        drop(waiting);
        self.state.unrecorded = unrecorded.of_all(&*self.ranks)?;
        self.share_found()?;
        let Some(books) = &mut self.books else { return Ok(()) };
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
        let all = folder::bad_steps(&self.config);
        let folder = all.join(format!("step_{step:08}"));
        self.ranks.enter(step, "recording a bad step");
        let batch = self.data.batch_with_pixels(position, &bad)?;
        bad_step::record(&folder, &self.config, &self.assembly, &batch, &*self.ranks)?;
        if behind > 0 {
            self.share_found()?;
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

    fn finish(&mut self, stopping: bool, meter: &Meter) -> Result<(u64, bool), Error> {
        let (step, steps) = (self.state.step, self.config.schedule.steps);
        let finished = (!stopping || step >= steps) && !self.state.evaluation_due;
        // A bad step has no checkpoint of its own, be it the last one or the one that a signal came in.
        let lacks = self.books.as_mut().map_or(Ok(false), |books| books.lacks_checkpoint(step))?;
        if self.ranks.any(lacks)? {
            self.save(None, meter)?;
        }
        if let Some(books) = &mut self.books {
            books.close(step, finished.then_some(steps))?;
        }
        // The next stage begins from what the first rank has written.
        self.ranks.any(false)?;
        Ok((step, finished))
    }
}

/// What ranks say, each thing once, with the first rank that says it where there are several.
fn lines_of_ranks(said: &[Option<String>]) -> Vec<String> {
    let first = |rank: usize| said[rank].is_some() && !said[..rank].contains(&said[rank]);
    let line = |rank: usize| match said.len() {
        1 => said[rank].clone(),
        _ => said[rank].as_ref().map(|line| format!("rank {rank}: {line}")),
    };
    (0..said.len()).filter(|&rank| first(rank)).filter_map(line).collect()
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
        line += &format!("\n    {} -> {}", one_line(&text.truth), one_line(&text.said));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_ranks_say_is_said_once_with_a_rank() {
        let [full, slow] = ["disk full", "disk slow"].map(|line| Some(line.to_owned()));
        assert_eq!(lines_of_ranks(std::slice::from_ref(&full)), ["disk full"]);
        assert_eq!(lines_of_ranks(&[None, full.clone(), slow, full]), ["rank 1: disk full", "rank 2: disk slow"]);
        assert!(lines_of_ranks(&[None, None]).is_empty());
    }
}
