//! Questions about held-out pictures, answered by a model that was not trained on any (BLIP-2, section 4.1: zero-shot VQA).

use blip2_data::{HostBatch, Quarantined};
use blip2_metrics::vqa_accuracy;
use blip2_model::language::{Decoding, EarlyStopping, GenerateOptions, LanguageModel};
use serde::Serialize;
use tch::Tensor;

use crate::config::AutoOr;
use crate::data::text::{Prompts, written};
use crate::error::Error;
use crate::evaluation::HeldOut;
use crate::task::{ForwardOptions, Stage2Task};

/// The paper's: answers of a word or two.
const MAX_ANSWER_TOKENS: usize = 10;
const DECODING: Decoding = Decoding::Beam { beams: 5, length_penalty: -1.0, early_stopping: EarlyStopping::Off };

/// Questions that are answered together, each by all its beams.
const BATCH: usize = 16;

/// No question has more tokens; a longer text would only fill the memory.
const MAX_PROMPT_TOKENS: usize = 512;

/// A question about a picture with the model's answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnsweredQuestion {
    /// The sample's index in the set.
    pub index: u64,
    /// The question, cleaned as captions are.
    pub question: String,
    /// What the model says.
    pub answer: String,
    /// What people said.
    pub answers: Vec<String>,
    /// How right the model is, 0 to 1.
    pub accuracy: f64,
}

impl AnsweredQuestion {
    /// What most people said, of several such answers the first.
    pub fn usual_answer(&self) -> &str {
        let count = |answer: &String| self.answers.iter().filter(|other| *other == answer).count();
        let first_of_most = self.answers.iter().rev().max_by_key(|answer| count(answer));
        first_of_most.map_or("", String::as_str)
    }
}

/// Asks the questions of a held-out set, each inside `prompt`, where it stands in the place of `{}`.
pub struct Examiner<'a> {
    task: &'a Stage2Task,
    prompts: Prompts,
    prompt: &'a str,
    options: GenerateOptions,
    /// Tokens of a prompt that the language model has room for.
    room: usize,
}

/// Samples of a batch whose prompts the model can read.
#[derive(Default)]
struct Asked {
    rows: Vec<usize>,
    prompts: Vec<Vec<i64>>,
}

impl<'a> Examiner<'a> {
    /// Asks `task`, with the paper's prompt for its kind of language model where none is given.
    pub fn new(task: &'a Stage2Task, prompts: Prompts, prompt: &'a AutoOr<String>) -> Examiner<'a> {
        let prompt = match (prompt, &*task.language) {
            (AutoOr::Given(prompt), _) => prompt.as_str(),
            (AutoOr::Auto, LanguageModel::Decoder(_)) => "Question: {} Answer:",
            (AutoOr::Auto, LanguageModel::T5(_)) => "Question: {} Short answer:",
        };
        let options = GenerateOptions {
            max_new_tokens: MAX_ANSWER_TOKENS,
            min_new_tokens: 1,
            eos: task.end_tokens.clone(),
            decoding: DECODING,
        };
        let positions = task.text_positions().unwrap_or(usize::MAX);
        let room = positions.saturating_sub(MAX_ANSWER_TOKENS).min(MAX_PROMPT_TOKENS);
        Examiner { task, prompts, prompt, options, room }
    }

    /// Answers to all questions of the pass, in order, and what of the set cannot be asked.
    ///
    /// # Errors
    /// When samples cannot be read or the device refuses.
    pub fn ask(
        &self,
        held_out: &mut HeldOut,
        pass: &ForwardOptions,
    ) -> Result<(Vec<AnsweredQuestion>, Vec<Quarantined>), Error> {
        let (mut answered, mut left_out) = (Vec::new(), Vec::new());
        while let Some(batch) = held_out.next_features() {
            let (features, host) = batch?;
            let asked = self.asked(&host, |row, reason| left_out.push(held_out.unused(host.sample_index[row], reason)));
            for (rows, prompts) in asked.rows.chunks(BATCH).zip(asked.prompts.chunks(BATCH)) {
                let chosen: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
                let features = features.index_select(0, &Tensor::from_slice(&chosen).to_device(features.device()));
                let ids = self.task.write(&features, prompts, pass.autocast, &self.options);
                for (&row, ids) in rows.iter().zip(&ids) {
                    let answer = written(&held_out.text().encoder, ids)?;
                    answered.push(AnsweredQuestion {
                        index: host.sample_index[row],
                        question: host.captions[row].clone(),
                        accuracy: vqa_accuracy(&answer, &host.answers[row]),
                        answers: host.answers[row].clone(),
                        answer,
                    });
                }
            }
        }
        left_out.extend(held_out.take_quarantined()?);
        left_out.sort_by_key(|sample| sample.index);
        Ok((answered, left_out))
    }

    fn asked(&self, host: &HostBatch, mut leave_out: impl FnMut(usize, String)) -> Asked {
        let mut asked = Asked::default();
        for (row, question) in host.captions.iter().enumerate() {
            match self.prompts.ids(&self.prompt.replacen("{}", question, 1)) {
                Err(error) => leave_out(row, format!("question: {error}")),
                Ok(ids) if ids.len() > self.room => {
                    let (tokens, room) = (ids.len(), self.room);
                    leave_out(row, format!("question: {tokens} tokens with its prompt; there is room for {room}"));
                }
                Ok(ids) => {
                    asked.rows.push(row);
                    asked.prompts.push(ids);
                }
            }
        }
        asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_answer_is_the_first_of_the_most_frequent() {
        let usual = |answers: &[&str]| {
            let answers = answers.iter().map(|answer| answer.to_string()).collect();
            let (question, answer) = (String::new(), String::new());
            AnsweredQuestion { index: 0, question, answer, answers, accuracy: 0.0 }.usual_answer().to_string()
        };
        assert_eq!(usual(&["no", "yes", "maybe", "yes", "maybe"]), "yes");
        assert_eq!(usual(&["no"]), "no");
        assert_eq!(usual(&[]), "");
    }
}
