//! `blip2 evaluate`: a run's model on its held-out set.

use std::collections::HashSet;
use std::sync::Arc;

use blip2_data::feature_store::Writer;
use blip2_data::{Corpus, Quarantined};
pub use blip2_metrics::Recall;
use blip2_metrics::summarize_captions;
use blip2_torchx::params::LoadPlan;
use blip2_weights::WeightsDir;
use serde::Serialize;

use crate::assembly::blueprint::Blueprint;
use crate::assembly::{Assembly, check_frozen};
use crate::checkpoint::{CheckpointStore, Rejected, TrainState};
use crate::config::{Change, Config, Difference, Stage};
use crate::data::index_lines::SetOpening;
use crate::data::sets::{open_held_out_set, open_questions};
use crate::device;
use crate::error::Error;
use crate::evaluation::vqa::{AnsweredQuestion, Examiner};
use crate::evaluation::{Evaluation, HeldOutSet, Tell};
use crate::features::memory::MemoryCaches;
use crate::ranks::{Alone, Pulse};
use crate::run::folder::RunFolder;
use crate::task::ForwardOptions;

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
    /// Stage 2's answers to questions beside those of people.
    Vqa,
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
    /// What was measured.
    pub measured: Measured,
}

/// What a pass over a held-out set gave.
#[derive(Debug)]
pub struct Measured {
    /// What the set holds and cannot be used.
    pub left_out: Vec<String>,
    /// That the feature cache on disk takes no more.
    pub note: Option<String>,
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
    /// Of [`EvaluationTask::Vqa`].
    Answers {
        /// Number of questions.
        questions: usize,
        /// Mean VQA accuracy, 0 to 1.
        accuracy: f64,
        /// Answers that differ from each other.
        distinct: usize,
        /// Every question with its answer.
        answers: Vec<AnsweredQuestion>,
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

/// The stream position of a pass that belongs to no run's course.
const ONCE: u64 = 0;

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
    let blueprint = Blueprint::open(config)?;
    // Before a model is loaded.
    let corpus = match task {
        EvaluationTask::Vqa => open_questions(config)?.ok_or_else(no_set)?,
        EvaluationTask::Retrieval { .. } | EvaluationTask::Captions => {
            let corpus = open_held_out_set(config, SetOpening::default(), &Pulse::default())?.ok_or_else(no_set)?;
            HeldOutSet::check(config, &corpus, &blueprint)?;
            corpus
        }
    };
    config.run.precision.set_tf32();
    let assembly = Assembly::build(config, blueprint, device::select(config.run.device)?)?;
    assembly.task.params().load(&WeightsDir::open(checkpoint.path())?, &LoadPlan::exact())?;
    // Who measures with another model on purpose is told so by the differences.
    if !differences.iter().any(|difference| difference.key.starts_with("model.")) {
        check_frozen(&TrainState::read(&checkpoint)?.frozen_weights, &assembly.frozen_weights())?;
    }
    let pass = ForwardOptions { autocast: config.run.precision.autocast(), dropout: 0.0, seed: config.run.seed };
    let measured = match task {
        EvaluationTask::Vqa => examine(config, corpus, &assembly, &pass, tell)?,
        EvaluationTask::Retrieval { .. } | EvaluationTask::Captions => {
            measure(config, &corpus, &assembly, &pass, task, tell)?
        }
    };
    Ok(RunReport { step: checkpoint.step(), rejected, differences, measured })
}

/// What the stage measures while training, of the whole set.
fn measure(
    config: &Config,
    corpus: &Arc<Corpus>,
    assembly: &Assembly,
    pass: &ForwardOptions,
    task: EvaluationTask,
    tell: Tell,
) -> Result<Measured, Error> {
    let mut set = HeldOutSet::open(config, corpus, assembly, &Alone, &mut MemoryCaches::default(), Writer::NoRun)?;
    (set.captions, set.retrieval) = (usize::MAX, true);
    if let EvaluationTask::Retrieval { rerank } = task {
        set.rerank = rerank;
    }
    let mut held_out = set.pass(assembly, &Alone, ONCE)?.heard_by(tell);
    let evaluation = assembly.task.evaluate(&mut held_out, pass)?;
    let left_out = [set.quarantined(), &held_out.take_quarantined()?].concat();
    Ok(Measured { left_out: names(&set, &left_out), note: set.take_note(), report: report(task, evaluation)? })
}

/// VQA accuracy.
fn examine(
    config: &Config,
    corpus: Arc<Corpus>,
    assembly: &Assembly,
    pass: &ForwardOptions,
    tell: Tell,
) -> Result<Measured, Error> {
    let Assembly { encoder, text, task, .. } = assembly;
    let stage2 = task.as_stage2().ok_or_else(|| Error::Mismatch("task.stage: 1 writes no answers".into()))?;
    let set = HeldOutSet::of(corpus, config, encoder, Writer::NoRun)?;
    let examiner = Examiner::new(stage2, text.prompts()?, &config.eval.vqa.prompt);
    let mut held_out = set.pass(assembly, &Alone, ONCE)?.heard_by(tell);
    let (answers, left_out) = examiner.ask(&mut held_out, pass)?;
    if answers.is_empty() {
        let first = left_out.first().map(ToString::to_string).unwrap_or_default();
        let vqa = &config.eval.vqa;
        return Err(Error::key(
            "data.val",
            "questions with answers",
            format!("none in {} samples; the first: {first}", set.samples()),
            &format!(
                "name the fields of the .json members in eval.vqa.question ({}) and eval.vqa.answers ({})",
                vqa.question, vqa.answers
            ),
        ));
    }
    let report = Report::Answers {
        questions: answers.len(),
        accuracy: answers.iter().map(|answered| answered.accuracy).sum::<f64>() / answers.len() as f64,
        distinct: answers.iter().map(|answered| answered.answer.as_str()).collect::<HashSet<_>>().len(),
        answers,
    };
    Ok(Measured { left_out: names(&set, &left_out), note: set.take_note(), report })
}

fn no_set() -> Error {
    Error::key("data.val", "shards to evaluate on", "nothing", "set data.val.shards")
}

/// All that cannot be used, what the indices say first.
fn names(set: &HeldOutSet, left_out: &[Quarantined]) -> Vec<String> {
    let problems = set.problems();
    problems.iter().map(ToString::to_string).chain(left_out.iter().map(ToString::to_string)).collect()
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
        EvaluationTask::Vqa => ("vqa", Stage::Two),
    };
    let got = config.task.stage;
    if got != stage {
        let advice = format!("give the config of a stage-{stage} run");
        return Err(Error::key("task.stage", format!("{stage} to evaluate {name}"), got, &advice));
    }
    if matches!(task, EvaluationTask::Retrieval { rerank: 1.. }) && config.task.losses.itm == 0.0 {
        let (expected, got) = ("above 0 to re-rank by ITM", "0: its head was not trained");
        return Err(Error::key("task.losses.itm", expected, got, "evaluate without --rerank"));
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
    let summary = summarize_captions(&said, &truth)?;
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
