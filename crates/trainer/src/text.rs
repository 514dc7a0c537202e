//! What stands around a caption: nothing in stage 1 (the tokenizer adds `[CLS]` and `[SEP]`), prompt and end token for a decoder.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{HostBatch, TextEncoder};
use blip2_model::language::LanguageConfig;

use crate::error::Error;

/// A tokenizer with the ids in front of and behind every caption.
#[derive(Clone)]
pub struct TextFrame {
    /// Captions to ids.
    pub encoder: Arc<TextEncoder>,
    /// Fills texts up to the longest of a batch.
    pub pad_id: i64,
    before: Vec<i64>,
    after: Vec<i64>,
}

impl TextFrame {
    /// Captions as the tokenizer gives them.
    pub fn plain(encoder: Arc<TextEncoder>, pad_id: i64) -> TextFrame {
        TextFrame { encoder, pad_id, before: Vec::new(), after: Vec::new() }
    }

    /// `prompt, caption, EOS` without a further BOS; `max_tokens` counts all of it.
    ///
    /// # Errors
    /// A tokenizer file that is missing or does not suit the model, a prompt that leaves no room for a caption.
    pub fn decoder(file: &Path, max_tokens: usize, prompt: &str, config: &LanguageConfig) -> Result<TextFrame, Error> {
        let eos = config.eos_token_ids();
        let Some(&end) = eos.first() else {
            return Err(Error::file(file.with_file_name("config.json"), "eos_token_id: expected an id, got none"));
        };
        let before: Vec<i64> = if prompt.is_empty() {
            Vec::new()
        } else {
            let whole = TextEncoder::from_file(file, max_tokens, false)?;
            whole.encode(prompt)?.into_iter().map(i64::from).collect()
        };
        let room = max_tokens.saturating_sub(before.len() + 1);
        if room == 0 {
            return Err(Error::Mismatch(format!(
                "model.language.prompt: takes {} of task.max_text_tokens ({max_tokens}), which leaves no caption; raise it",
                before.len()
            )));
        }
        let encoder = TextEncoder::from_file(file, room, false)?;
        let largest = encoder.vocab_size() as i64;
        if largest > config.vocab_size() {
            let vocabulary = config.vocab_size();
            return Err(Error::file(file, format!("{largest} tokens, but the model's vocabulary is {vocabulary}")));
        }
        Ok(TextFrame { encoder: Arc::new(encoder), pad_id: config.pad_token_id(), before, after: vec![end] })
    }

    /// Tokens in front of the caption.
    pub fn prompt_tokens(&self) -> usize {
        self.before.len()
    }

    /// The same batch with every text framed.
    pub fn frame(&self, batch: HostBatch) -> HostBatch {
        if self.before.is_empty() && self.after.is_empty() {
            return batch;
        }
        let added = self.before.len() + self.after.len();
        let text_len = batch.text_len + added;
        let mut input_ids = Vec::with_capacity(batch.size * text_len);
        for (row, &length) in batch.lengths.iter().enumerate() {
            let end = input_ids.len() + text_len;
            input_ids.extend(&self.before);
            input_ids.extend(&batch.input_ids[row * batch.text_len..][..length]);
            input_ids.extend(&self.after);
            input_ids.resize(end, self.pad_id);
        }
        HostBatch { input_ids, text_len, lengths: batch.lengths.iter().map(|l| l + added).collect(), ..batch }
    }
}
