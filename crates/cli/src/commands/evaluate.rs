//! `evaluate`: a run's model on its held-out set.

use std::path::PathBuf;

use anyhow::Result;
use blip2_trainer::config::Config;
use blip2_trainer::evaluate::{EvaluationTask, Report, evaluate_run};
use blip2_trainer::vqa::AnsweredQuestion;
use clap::{Args, ValueEnum};

use crate::hub;
use crate::output::{print, print_json, say};
use crate::shard_cache;

const EXAMPLES: &str = "\
Examples:
  blip2 evaluate --config runs/stage1/config.yaml --task retrieval
  blip2 evaluate --config stage2.yaml --task caption --json
  blip2 evaluate --config stage2_vqa.yaml --task vqa

The run's best checkpoint by checkpoint.best is measured on data.val, else its newest.

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
        let mut config = Config::load(&self.config, &[])?;
        hub::from_environment()?.resolve(&mut config)?;
        config.data.shard_cache.settle(shard_cache::folder().as_deref());
        let task = match self.task {
            TaskArgument::Retrieval => EvaluationTask::Retrieval,
            TaskArgument::Caption => EvaluationTask::Captions,
            TaskArgument::Vqa => EvaluationTask::Vqa,
        };
        let found = evaluate_run(&config, task)?;
        for rejected in &found.rejected {
            say(&format!("warning: not taken: {}", rejected.reason));
        }
        if !found.differences.is_empty() {
            let keys = found.differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            say(&format!("warning: measured otherwise than the run was trained: {keys}"));
        }
        if let [first, ..] = found.left_out.as_slice() {
            say(&format!(
                "warning: data.val: {} samples cannot be used and are left out, the first: {first}",
                found.left_out.len()
            ));
        }
        if self.json {
            return print_json(&found.report);
        }
        print(format_args!("{}: step {}\n{}", config.run_folder().display(), found.step, text(&found.report)))
    }
}

fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    match report {
        Report::Retrieval { images, recall } => {
            lines.push(format!("recall over {images} images   image to text   text to image"));
            for r in recall {
                let (i2t, t2i) = (100.0 * r.image_to_text, 100.0 * r.text_to_image);
                lines.push(format!("  at {:<3}{:>25.1} %{:>14.1} %", r.k, i2t, t2i));
            }
        }
        Report::Captions { images, loss, distinct, exact, word_overlap, captions } => {
            lines.extend(captions.iter().map(|pair| format!("{} -> {}", pair.truth, pair.caption)));
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

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
