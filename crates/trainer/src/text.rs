//! What stands around a caption: nothing in stage 1 (the tokenizer adds `[CLS]` and `[SEP]`), prompt and end token for a decoder, OPT's `</s>`
//! in front of them.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{HostBatch, TextEncoder};
use blip2_model::language::{CaptionFrame, LanguageConfig};

use crate::error::Error;

/// A tokenizer with the ids in front of and behind every caption.
#[derive(Clone)]
pub struct TextFrame {
    /// Captions to ids.
    pub encoder: Arc<TextEncoder>,
    /// Fills texts up to the longest of a batch.
    pub pad_id: i64,
    before: Vec<i64>,
    /// Tokens at the beginning of a framed text that are no targets.
    untargeted: usize,
    after: Vec<i64>,
    end_tokens: Vec<i64>,
}

impl TextFrame {
    /// Captions as the tokenizer gives them.
    pub fn plain(encoder: Arc<TextEncoder>, pad_id: i64) -> TextFrame {
        TextFrame { encoder, pad_id, before: Vec::new(), untargeted: 0, after: Vec::new(), end_tokens: Vec::new() }
    }

    /// `prompt, caption, EOS` without a further BOS; `</s>, prompt, caption, "\n"` for OPT. `max_tokens` counts all of it.
    ///
    /// The prompt is no target, and with it OPT's `</s>`; where there is no prompt, `</s>` is one, as LAVIS trained it.
    ///
    /// # Errors
    /// A tokenizer file that is missing or does not suit the model, a prompt that leaves no room for a caption.
    pub fn decoder(file: &Path, max_tokens: usize, prompt: &str, config: &LanguageConfig) -> Result<TextFrame, Error> {
        let vocabulary = config.vocab_size();
        let tokenizer = |max_tokens| {
            let encoder = TextEncoder::from_file(file, max_tokens, false)?;
            let size = encoder.vocab_size();
            let too_large = || Error::file(file, format!("{size} tokens, but the model's vocabulary is {vocabulary}"));
            encoder.within(vocabulary as usize).ok_or_else(too_large)
        };
        let whole = tokenizer(max_tokens)?;
        let ids = |text: &str| -> Result<Vec<i64>, Error> {
            Ok(if text.is_empty() { Vec::new() } else { whole.encode(text)?.into_iter().map(i64::from).collect() })
        };
        let own_ends = config.eos_token_ids();
        let (first, end) = match config.caption_frame() {
            CaptionFrame::BosFirst => match own_ends.first() {
                Some(&end) => (None, end),
                None => {
                    let message = "eos_token_id: expected an id, got none";
                    return Err(Error::file(file.with_file_name("config.json"), message));
                }
            },
            CaptionFrame::Opt => match ids("\n")?.as_slice() {
                // A tokenizer without this token gives its unknown one, which stands for no line break.
                [line_end] if whole.decode(&[*line_end as u32])? == "\n" => (config.bos_token_id(), *line_end),
                other => {
                    let message = "OPT's captions end with a line break, which must be one token of the tokenizer";
                    return Err(Error::file(file, format!("{message}; it is {other:?}")));
                }
            },
        };
        let prompt = ids(prompt)?;
        let untargeted = if prompt.is_empty() { 0 } else { prompt.len() + usize::from(first.is_some()) };
        let before: Vec<i64> = first.into_iter().chain(prompt).collect();
        let room = max_tokens.saturating_sub(before.len() + 1);
        if room == 0 {
            return Err(Error::Mismatch(format!(
                "model.language.prompt: takes {} of task.max_text_tokens ({max_tokens}), which leaves no caption; raise it",
                before.len()
            )));
        }
        let encoder = tokenizer(room)?;
        let mut end_tokens = own_ends;
        if !end_tokens.contains(&end) {
            end_tokens.insert(0, end);
        }
        let pad_id = config.pad_token_id();
        Ok(TextFrame { encoder: Arc::new(encoder), pad_id, before, untargeted, after: vec![end], end_tokens })
    }

    /// Tokens at the beginning of a framed text that are no targets.
    pub fn untargeted_tokens(&self) -> usize {
        self.untargeted
    }

    /// Tokens that end a generated caption, first the one that training puts there.
    pub fn end_tokens(&self) -> &[i64] {
        &self.end_tokens
    }

    /// Tokens in front of the caption.
    pub fn tokens_before(&self) -> &[i64] {
        &self.before
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
