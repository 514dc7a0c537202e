//! What a run says while it trains: `metrics.jsonl` is the record, TensorBoard and the progress bar are views of it.

mod events;
mod jsonl;
mod progress;
mod tensorboard;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use jsonl::{Record, cut_back};
pub use progress::{Output, Shown};
pub use tensorboard::EventWriter;

use jsonl::JsonlWriter;
use progress::Progress;

/// Why metrics cannot be written.
#[derive(Debug, Error)]
#[error("{}: metrics cannot be written: {source}", path.display())]
pub struct TelemetryError {
    /// The file or folder.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl TelemetryError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self { path: path.to_path_buf(), source }
    }
}

/// Where a run's telemetry goes, and how long the run is.
#[derive(Debug)]
pub struct TelemetryPlan {
    /// The JSONL file.
    pub metrics: PathBuf,
    /// The folder of TensorBoard's event files.
    pub tensorboard: PathBuf,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps done already: 0, or the step of the checkpoint that the run goes on from.
    pub start: u64,
    /// Whether that step's evaluation is still to come: what an earlier attempt has recorded of it goes.
    pub evaluation_due: bool,
    /// Where progress is shown.
    pub output: Output,
    /// The scalars in the progress line, in order.
    pub shown: Vec<Shown>,
}

/// Gives each record to the JSONL file, to TensorBoard and to the progress line.
#[derive(Debug)]
pub struct Telemetry {
    jsonl: JsonlWriter,
    events: EventWriter,
    progress: Progress,
}

impl Telemetry {
    /// Cuts the JSONL file and TensorBoard's back to the step that the run goes on from, and begins a new event file there.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn open(plan: TelemetryPlan) -> Result<Self, TelemetryError> {
        let comes_again = |record: &Record| plan.evaluation_due && record.is_of_evaluation();
        let keeps = |record: &Record| record.step < plan.start || (record.step == plan.start && !comes_again(record));
        let kept = cut_back(&plan.metrics, keeps)?;
        // A viewer that has read older files drops what they hold from the session's first step on, texts and images too. The step of the
        // checkpoint stays as it is, unless its evaluation comes again: then only what was trained is said again.
        let stays = plan.start > 0 && !plan.evaluation_due;
        let session = plan.start + u64::from(stays);
        tensorboard::cut_back(&plan.tensorboard, session)?;
        let mut events = EventWriter::create(&plan.tensorboard, session)?;
        for record in kept.iter().filter(|record| record.step >= session) {
            events.scalars(record)?;
        }
        Ok(Self {
            jsonl: JsonlWriter::open(&plan.metrics)?,
            events,
            progress: Progress::new(plan.output, plan.steps, plan.start, plan.shown),
        })
    }

    /// Writes named scalars measured after `step` steps.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn record(&mut self, record: &Record) -> Result<(), TelemetryError> {
        self.jsonl.append(record)?;
        self.events.scalars(record)?;
        self.progress.record(record);
        Ok(())
    }

    /// Writes a Markdown text to TensorBoard.
    ///
    /// # Errors
    /// The event file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) -> Result<(), TelemetryError> {
        self.events.text(step, tag, markdown)
    }

    /// Writes a PNG image to TensorBoard.
    ///
    /// # Errors
    /// The event file cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, png: Vec<u8>, width: u32, height: u32) -> Result<(), TelemetryError> {
        self.events.image(step, tag, png, width, height)
    }

    /// Moves the progress bar; cheap enough for every step.
    pub fn step(&mut self, step: u64) {
        self.progress.step(step);
    }

    /// Shows a line of text above the progress bar.
    pub fn note(&mut self, line: &str) {
        self.progress.note(line);
    }

    /// Leaves the progress line as it stands and makes the records last through a power failure.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn sync(&mut self) -> Result<(), TelemetryError> {
        self.progress.finish();
        self.jsonl.sync()?;
        self.events.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_resumed_run_continues_the_record_at_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let plan = |start| TelemetryPlan {
            metrics: folder.path().join("metrics.jsonl"),
            tensorboard: folder.path().join("tensorboard"),
            steps: 100,
            start,
            evaluation_due: start == 30,
            output: Output::Hidden,
            shown: Vec::new(),
        };
        let record = |step, loss| Record::new(step, [("loss", loss)]);
        let mut first = Telemetry::open(plan(0)).unwrap();
        for step in [10, 20, 30] {
            first.record(&record(step, 1.0)).unwrap();
        }
        drop(first);
        let mut second = Telemetry::open(plan(20)).unwrap();
        second.record(&record(30, 0.5)).unwrap();
        second.sync().unwrap();
        let lines = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        assert_eq!(lines, "{\"step\":10,\"loss\":1.0}\n{\"step\":20,\"loss\":1.0}\n{\"step\":30,\"loss\":0.5}\n");
        assert_eq!(fs::read_dir(folder.path().join("tensorboard")).unwrap().count(), 2);
        // Of an evaluation that is to come again the record of the first attempt goes.
        second.record(&Record::new(30, [("val_loss", 0.7)])).unwrap();
        drop(Telemetry::open(plan(30)).unwrap());
        assert_eq!(fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap(), lines);
    }
}
