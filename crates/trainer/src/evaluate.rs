//! `blip2 evaluate`: a run's model on its held-out set.

use blip2_data::Quarantined;
pub use blip2_metrics::Recall;
use blip2_metrics::summarize_captions;
use blip2_torchx::params::LoadPlan;
use blip2_weights::WeightsDir;
use serde::Serialize;

use crate::assembly::Assembly;
use crate::blueprint::Blueprint;
use crate::checkpoint::{CheckpointStore, Rejected};
use crate::config::{Change, Config, Difference, Stage};
use crate::device;
use crate::error::Error;
use crate::evaluation::{Evaluation, HeldOutSet, Tell};
use crate::memory_features::MemoryCaches;
use crate::ranks::Alone;
use crate::run_folder::RunFolder;
use crate::task::Pass;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvaluationTask {
    /// Recall in both directions by stage 1's contrastive similarity.
    Retrieval {
        /// How many candidates of each query are re-ranked by ITM (BLIP-2, section 4.4: 128); 0: none.
        rerank: usize,
    },
    /// Stage 2's captions beside the true ones.
    Captions,
}

/// What was measured on a run's held-out set.
#[derive(Debug)]
pub struct RunReport {
    /// Steps of the checkpoint that was taken.
    pub step: u64,
    /// Better or newer checkpoints that are damaged.
    pub rejected: Vec<Rejected>,
    /// Keys that `config` sets otherwise than the run, and that what is measured may depend on.
    pub differences: Vec<Difference>,
    /// What the set holds and cannot be used.
    pub left_out: Vec<String>,
    /// The figures.
    pub report: Report,
}

/// Figures of a held-out set.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Report {
    /// Of [`EvaluationTask::Retrieval`].
    Retrieval {
        /// Different pictures.
        images: usize,
        /// Texts.
        texts: usize,
        /// By rank.
        recall: Vec<Recall>,
        /// How many candidates of each query were re-ranked.
        #[serde(skip_serializing_if = "is_zero")]
        rerank: usize,
        /// By rank, behind re-ranking.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        reranked: Vec<Recall>,
    },
    /// Of [`EvaluationTask::Captions`].
    Captions {
        /// Pictures.
        images: usize,
        /// Mean language-modelling loss of the true captions.
        loss: f64,
        /// Captions that differ from each other.
        distinct: usize,
        /// Captions that are the true one.
        exact: usize,
        /// Mean share of a true caption's words that are in the model's.
        word_overlap: f64,
        /// Every caption.
        captions: Vec<CaptionPair>,
    },
}

/// A true caption and the model's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaptionPair {
    /// The picture's index in the set.
    pub index: u64,
    /// Its caption.
    pub truth: String,
    /// What the model says.
    pub caption: String,
}

/// Measures the run that `config` names: its best checkpoint by `checkpoint.best`, else its newest, on `data.val`. `tell` hears how far it is.
///
/// # Errors
/// A task of the other stage, no held-out set, no checkpoint that is whole; whatever building the model or reading the set finds.
pub fn evaluate_run(config: &Config, task: EvaluationTask, tell: Tell) -> Result<RunReport, Error> {
    check_stage(config, task)?;
    let folder = config.run_folder();
    let found = CheckpointStore::read_only(&folder.join("checkpoints"), config.checkpoint.best).preferred()?;
    let (checkpoint, rejected) = found.or_none_of(&folder)?;
    let differences = measured_otherwise(config)?;
    config.run.precision.settle();
    let assembly = Assembly::build(config, Blueprint::open(config)?, device::select(config.run.device)?)?;
    assembly.task.params().load(&WeightsDir::open(checkpoint.path())?, &LoadPlan::exact())?;
    let set = HeldOutSet::open(config, &assembly.encoder, &assembly.text, &Alone, &mut MemoryCaches::default(), None)?;
    let none = || Error::Mismatch("data.val: expected shards to evaluate on, got nothing; set data.val.shards".into());
    let mut set = set.ok_or_else(none)?;
    (set.captions, set.retrieval) = (usize::MAX, true);
    if let EvaluationTask::Retrieval { rerank } = task {
        set.rerank = rerank;
    }
    let pass = Pass { autocast: config.run.precision.autocast(), dropout: 0.0, seed: config.run.seed };
    let mut held_out = set.pass(&assembly.encoder, &assembly.text, assembly.task.target_rule(), &Alone)?.heard_by(tell);
    let evaluation = assembly.task.evaluate(&mut held_out, &pass)?;
    let (problems, unread) = (set.problems(), held_out.take_quarantined()?);
    let names = |found: &[Quarantined]| found.iter().map(ToString::to_string).collect::<Vec<_>>();
    let left_out =
        [problems.iter().map(ToString::to_string).collect(), names(set.quarantined()), names(&unread)].concat();
    Ok(RunReport { step: checkpoint.step(), rejected, differences, left_out, report: report(task, evaluation)? })
}

/// The differences from the run's own configuration that are not only about how it was trained.
fn measured_otherwise(config: &Config) -> Result<Vec<Difference>, Error> {
    let about_training = ["optimizer.", "schedule.", "task.losses.", "model.qformer.dropout", "data.train."];
    let matters =
        |d: &Difference| d.change == Change::Refused && !about_training.iter().any(|key| d.key.starts_with(key));
    Ok(RunFolder::differences(config)?.into_iter().filter(matters).collect())
}

fn check_stage(config: &Config, task: EvaluationTask) -> Result<(), Error> {
    let (name, stage) = match task {
        EvaluationTask::Retrieval { .. } => ("retrieval", Stage::One),
        EvaluationTask::Captions => ("caption", Stage::Two),
    };
    let got = config.task.stage;
    if got != stage {
        return Err(Error::Mismatch(format!(
            "task.stage: expected {stage} to evaluate {name}, got {got}; give the config of a stage-{stage} run"
        )));
    }
    if matches!(task, EvaluationTask::Retrieval { rerank: 1.. }) && config.task.losses.itm == 0.0 {
        let message = "expected above 0 to re-rank by ITM, got 0: its head was not trained; evaluate without --rerank";
        return Err(Error::Mismatch(format!("task.losses.itm: {message}")));
    }
    Ok(())
}

fn report(task: EvaluationTask, evaluation: Evaluation) -> Result<Report, Error> {
    if let EvaluationTask::Retrieval { rerank } = task {
        let Evaluation { images, samples: texts, recall, reranked, .. } = evaluation;
        return Ok(Report::Retrieval { images, texts, recall, rerank, reranked });
    }
    let images = evaluation.samples;
    let loss = evaluation.get("val_loss").unwrap_or(f64::NAN);
    let (said, truth): (Vec<&str>, Vec<&str>) =
        evaluation.texts.iter().map(|t| (t.said.as_str(), t.truth.as_str())).unzip();
    let summary = summarize_captions(&said, &truth).map_err(|error| Error::Mismatch(error.to_string()))?;
    let captions =
        evaluation.texts.into_iter().map(|t| CaptionPair { index: t.index, truth: t.truth, caption: t.said });
    Ok(Report::Captions {
        images,
        loss,
        distinct: summary.distinct,
        exact: summary.exact,
        word_overlap: summary.word_overlap,
        captions: captions.collect(),
    })
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}
