//! `evaluate`: a run's model on its held-out set.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::config::Config;
use blip2_trainer::evaluation::{AnsweredQuestion, EvaluationTask, Measured, Recall, Report, evaluate_run, one_line};
use clap::{Args, ValueEnum};

use crate::hub;
use crate::launch;
use crate::output::{UsageError, print, print_json, say};
use crate::progress::Phases;
use crate::shard_cache;

const EXAMPLES: &str = "\
Examples:
  blip2 evaluate --config runs/stage1/config.yaml --task retrieval
  blip2 evaluate --config runs/stage1/config.yaml --task retrieval --rerank 128
  blip2 evaluate --config stage2.yaml --task caption --json
  blip2 evaluate --config stage2_vqa.yaml --task vqa

The run's best checkpoint by checkpoint.best is measured on data.val, else its newest.

--rerank keeps the features of all images in memory, images x tokens x width x 2 bytes in bf16 (1,000 images behind ViT-g at 224 pixels: 0.7 GB), and
runs the Q-Former on up to 2 x K pairs an image.

For vqa data.val holds questions: each picture has a .json member with the question (a text) and its answers (a text, a list of texts, or a list of
objects with a text \"answer\", as VQAv2's annotations have), in the fields that eval.vqa.question and eval.vqa.answers name. The model reads
eval.vqa.prompt with {} in the question's place, \"Question: {} Answer:\" unless set (an encoder-decoder: \"Question: {} Short answer:\"), and writes at
most ten tokens with five beams and a length penalty of -1.";

/// Answers that are shown as examples; --json has all.
const SHOWN_ANSWERS: usize = 12;

/// Measure a run's model on its held-out set
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EvaluateArguments {
    /// Configuration file of the run
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What to measure
    #[arg(long, value_name = "TASK")]
    task: TaskArgument,
    /// Also put the K most similar candidates of each query in order by ITC and ITM together: 128 in the paper, 0 for none (retrieval)
    #[arg(long, value_name = "K", default_value_t = 0)]
    rerank: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TaskArgument {
    /// Recall at 1, 5 and 10 from image to text and from text to image (a stage-1 run)
    Retrieval,
    /// Captions beside the true ones, and the loss (a stage-2 run)
    Caption,
    /// VQA accuracy of answers to questions about the pictures (a stage-2 run)
    Vqa,
}

impl EvaluateArguments {
    pub(crate) fn run(self) -> Result<()> {
        if self.rerank > 0 && !matches!(self.task, TaskArgument::Retrieval) {
            let got = self.task.to_possible_value().map(|task| task.get_name().to_owned()).unwrap_or_default();
            let message = format!("--rerank: expected beside --task retrieval, got --task {got}; leave --rerank out");
            return Err(UsageError(message).into());
        }
        launch::alone("evaluate")?;
        let mut config = Config::load(&self.config, &[])?;
        hub::from_environment()?.resolve(&mut config)?;
        config.data.shard_cache.resolve_dir(shard_cache::folder().as_deref());
        let task = match self.task {
            TaskArgument::Retrieval => EvaluationTask::Retrieval { rerank: self.rerank },
            TaskArgument::Caption => EvaluationTask::Captions,
            TaskArgument::Vqa => EvaluationTask::Vqa,
        };
        let phases = Phases::default();
        let found = evaluate_run(&config, task, &|what, done, all| phases.tell(what, done, all))?;
        drop(phases);
        for rejected in &found.rejected {
            say(&format!("warning: not taken: {}", rejected.reason));
        }
        if !found.differences.is_empty() {
            let keys = found.differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            say(&format!("warning: measured otherwise than the run was trained: {keys}"));
        }
        let Measured { left_out, note, report } = &found.measured;
        if let [first, ..] = left_out.as_slice() {
            say(&format!(
                "warning: data.val: {} samples cannot be used and are left out, the first: {first}",
                left_out.len()
            ));
        }
        note.iter().for_each(|line| say(line));
        if self.json {
            return print_json(report);
        }
        print(format_args!("{}: step {}\n{}", config.run_folder().display(), found.step, text(report)))
    }
}

fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    match report {
        Report::Retrieval { images, recall, rerank, reranked, .. } => {
            lines.extend(table(&format!("recall over {images} images"), recall));
            if !reranked.is_empty() {
                lines.extend(table(&format!("the first {rerank} re-ranked"), reranked));
            }
        }
        Report::Captions { images, loss, distinct, exact, word_overlap, captions } => {
            lines.extend(captions.iter().map(|pair| one_line(&format!("{} -> {}", pair.truth, pair.caption))));
            let shared = 100.0 * word_overlap;
            lines.push(format!(
                "{images} images: loss {loss:.3}; {distinct} different captions, {exact} word for word, {shared:.0} % of the true words"
            ));
        }
        Report::Answers { questions, accuracy, distinct, answers } => {
            lines.extend(answers.iter().take(SHOWN_ANSWERS).map(|answered| {
                let AnsweredQuestion { question, answer, .. } = answered;
                one_line(&format!("{question} -> {answer} (people: {})", answered.usual_answer()))
            }));
            lines.push(format!(
                "{questions} questions: accuracy {:.1} %; {distinct} different answers",
                100.0 * accuracy
            ));
        }
    }
    lines.join("\n")
}

fn table(title: &str, recall: &[Recall]) -> Vec<String> {
    let row = |r: &Recall| {
        let (i2t, t2i) = (100.0 * r.image_to_text, 100.0 * r.text_to_image);
        format!("  at {:<3}{i2t:>25.1} %{t2i:>14.1} %", r.k)
    };
    std::iter::once(format!("{title:<25}image to text   text to image")).chain(recall.iter().map(row)).collect()
}
