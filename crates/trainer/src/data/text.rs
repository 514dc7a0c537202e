//! What stands around a caption: nothing in stage 1 (the tokenizer adds `[CLS]` and `[SEP]`), prompt and end token for a language model.
//!
//! | model | reads | writes |
//! |---|---|---|
//! | stage 1 | `[CLS] caption [SEP]` | the same, from the second token on |
//! | decoder | `prompt caption EOS` | the same, from the caption on |
//! | OPT | `</s> prompt caption "\n"` | the same, from the caption on; without a prompt from `</s>` on, as LAVIS trained it |
//! | encoder-decoder | `prompt prefix EOS` | `suffix EOS` |
//!
//! `prefix suffix` is the caption; the prefix is empty unless captions are split. Prompt and caption are tokenised as one text, with a space between
//! them, as LAVIS does, since many tokenizers have other tokens for a word behind a space; the first tokens, as many as the prompt alone has,
//! count as the prompt.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{HostBatch, TextEncoder};
use blip2_model::language::{CaptionFrame, LanguageConfig, T5Config};

use crate::data::framed::{FramedBatch, IdRows};
use crate::data::prefix::split_point;
use crate::error::Error;

/// A tokenizer with the ids in front of and behind every caption.
#[derive(Clone)]
pub struct TextFrame {
    /// Captions to ids.
    pub encoder: Arc<TextEncoder>,
    /// Fills texts up to the longest of a batch.
    pub pad_id: i64,
    /// What stands in front of the tokenised text, prompt included.
    first: Option<i64>,
    /// The prompt alone, as generation has it.
    prompt: Vec<i64>,
    after: Vec<i64>,
    end_tokens: Vec<i64>,
    read_apart: Option<ReadApart>,
}

/// Prompts of any length, each in the place of the run's own.
pub struct Prompts {
    frame: TextFrame,
}

/// An encoder-decoder reads another text than it writes.
#[derive(Clone)]
struct ReadApart {
    /// What its tokenizer puts behind a text: `</s>`.
    after: Vec<i64>,
    /// Decides where captions are split; `None`: the decoder writes the whole caption.
    split_seed: Option<u64>,
}

impl TextFrame {
    /// Captions as the tokenizer gives them.
    pub fn plain(encoder: Arc<TextEncoder>, pad_id: i64) -> TextFrame {
        TextFrame {
            encoder,
            pad_id,
            first: None,
            prompt: Vec::new(),
            after: Vec::new(),
            end_tokens: Vec::new(),
            read_apart: None,
        }
    }

    /// `prompt, caption, EOS` without a further BOS; `</s>, prompt, caption, "\n"` for OPT. `max_tokens` counts all of it.
    ///
    /// The prompt is no target, and with it OPT's `</s>`; where there is no prompt, `</s>` is one, as LAVIS trained it.
    ///
    /// # Errors
    /// A tokenizer file that is missing or does not suit the model, a prompt that leaves no room for a caption.
    pub fn decoder(file: &Path, max_tokens: usize, prompt: &str, config: &LanguageConfig) -> Result<TextFrame, Error> {
        let whole = open(file, max_tokens, config.vocab_size())?;
        let own_ends = config.eos_token_ids();
        let (first, end) = match config.caption_frame() {
            Some(CaptionFrame::Opt) => (config.bos_token_id(), line_end(file, &whole)?),
            Some(CaptionFrame::BosFirst) | None => match own_ends.first() {
                Some(&end) => (None, end),
                None => {
                    let message = "eos_token_id: expected an id, got none";
                    return Err(Error::file(file.with_file_name("config.json"), message));
                }
            },
        };
        let added = 1 + usize::from(first.is_some());
        let (encoder, prompt) = with_prompt(whole, max_tokens, prompt, added)?;
        let mut end_tokens = own_ends;
        if !end_tokens.contains(&end) {
            end_tokens.insert(0, end);
        }
        Ok(TextFrame {
            encoder: Arc::new(encoder),
            pad_id: config.pad_token_id(),
            first,
            prompt,
            after: vec![end],
            end_tokens,
            read_apart: None,
        })
    }

    /// `prompt, prefix, EOS` to be read and `suffix, EOS` to be written, each of at most `max_tokens`.
    ///
    /// With `split_seed` captions are split at their `split_point`, else all of the caption is the suffix.
    ///
    /// # Errors
    /// A tokenizer file that is missing or does not suit the model, a prompt that leaves no room for a caption.
    pub fn encoder_decoder(
        file: &Path,
        max_tokens: usize,
        prompt: &str,
        config: &T5Config,
        split_seed: Option<u64>,
    ) -> Result<TextFrame, Error> {
        let special = TextEncoder::from_file(file, max_tokens, true)?.encode("")?;
        let whole = open(file, max_tokens, config.vocab_size)?;
        let added = special.len().max(1);
        let (encoder, prompt) = with_prompt(whole, max_tokens, prompt, added)?;
        let encoder = match split_seed {
            Some(_) => encoder,
            // The decoder writes a text of its own.
            None => encoder.led_by(String::new()).of_length(max_tokens.saturating_sub(prompt.len() + added))?,
        };
        Ok(TextFrame {
            encoder: Arc::new(encoder),
            pad_id: config.pad_token_id,
            first: None,
            prompt,
            after: vec![config.eos_token_id],
            end_tokens: vec![config.eos_token_id],
            read_apart: Some(ReadApart { after: special.into_iter().map(i64::from).collect(), split_seed }),
        })
    }

    /// What the model reads behind the queries before it writes a caption of its own.
    pub fn prompt(&self) -> Vec<i64> {
        self.framed_prompt(&self.prompt)
    }

    /// Other prompts in the place of this one.
    ///
    /// # Errors
    /// When the tokenizer refuses to cut no text.
    pub fn prompts(&self) -> Result<Prompts, Error> {
        let encoder = TextEncoder::clone(&self.encoder).led_by(String::new()).of_length(usize::MAX)?;
        Ok(Prompts { frame: TextFrame { encoder: Arc::new(encoder), ..self.clone() } })
    }

    fn framed_prompt(&self, ids: &[i64]) -> Vec<i64> {
        let behind = self.read_apart.as_ref().map(|read| read.after.as_slice()).unwrap_or_default();
        [self.first.as_slice(), ids, behind].concat()
    }

    /// How many tokens at the beginning of the target text are no targets: the prompt and what stands in front of it, where they stand in that
    /// text.
    pub fn untargeted(&self) -> usize {
        match (&self.read_apart, self.prompt.len()) {
            (Some(_), _) | (None, 0) => 0,
            (None, prompt) => prompt + usize::from(self.first.is_some()),
        }
    }

    /// Tokens that end a generated caption, first the one that training puts there.
    pub fn end_tokens(&self) -> &[i64] {
        &self.end_tokens
    }

    /// The batch with every text framed, padded to a multiple of `pad_to_multiple`; one without a frame stays as it is.
    ///
    /// # Panics
    /// When `pad_to_multiple` is zero.
    pub fn frame(&self, batch: HostBatch, pad_to_multiple: usize) -> FramedBatch {
        if self.after.is_empty() {
            return batch.into();
        }
        let texts = batch.lengths.iter().enumerate().map(|(row, &n)| &batch.input_ids[row * batch.text_len..][..n]);
        let (read, written): (Vec<_>, Option<Vec<_>>) = match &self.read_apart {
            None => (texts.map(|text| [self.first.as_slice(), text, &self.after].concat()).collect(), None),
            Some(apart) => {
                let both = texts.zip(&batch.positions).map(|(text, &position)| {
                    let (read, written) = match apart.split_seed {
                        None => (self.prompt.as_slice(), text),
                        Some(seed) => {
                            let prompt = self.prompt.len().min(text.len());
                            text.split_at(prompt + split_point(seed, position, text.len() - prompt))
                        }
                    };
                    ([read, &apart.after].concat(), [written, &self.after].concat())
                });
                let (read, written) = both.unzip();
                (read, Some(written))
            }
        };
        let IdRows { ids, lengths, width } = IdRows::padded(&read, self.pad_id, pad_to_multiple);
        FramedBatch {
            written: written.map(|rows| IdRows::padded(&rows, self.pad_id, pad_to_multiple)),
            host: HostBatch { input_ids: ids, lengths, text_len: width, ..batch },
        }
    }
}

impl Prompts {
    /// What the model reads behind the queries with this prompt.
    ///
    /// # Errors
    /// A text that cannot be tokenised.
    pub fn ids(&self, prompt: &str) -> Result<Vec<i64>, Error> {
        let ids: Vec<i64> = self.frame.encoder.encode(trimmed(prompt))?.into_iter().map(i64::from).collect();
        Ok(self.frame.framed_prompt(&ids))
    }
}

/// The text of new ids, without special tokens and surrounding white space.
///
/// # Errors
/// When the tokenizer's decoder fails.
pub(crate) fn written(encoder: &TextEncoder, ids: &[i64]) -> Result<String, Error> {
    let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
    Ok(encoder.decode(&ids)?.trim().to_string())
}

/// A tokenizer that suits a model of `vocabulary` tokens.
fn open(file: &Path, max_tokens: usize, vocabulary: i64) -> Result<TextEncoder, Error> {
    let encoder = TextEncoder::from_file(file, max_tokens, false)?;
    let size = encoder.vocab_size();
    let too_large = || Error::file(file, format!("{size} tokens, but the model's vocabulary is {vocabulary}"));
    encoder.within(vocabulary as usize).ok_or_else(too_large)
}

/// The line break that ends OPT's captions.
fn line_end(file: &Path, tokenizer: &TextEncoder) -> Result<i64, Error> {
    match tokenizer.encode("\n")?.as_slice() {
        // A tokenizer without this token gives its unknown one, which stands for no line break.
        &[line_end] if tokenizer.decode(&[line_end])? == "\n" => Ok(i64::from(line_end)),
        other => {
            let message = "OPT's captions end with a line break, which must be one token of the tokenizer";
            Err(Error::file(file, format!("{message}; it is {other:?}")))
        }
    }
}

/// The tokenizer of captions behind the prompt, of a length that leaves room for `added` tokens, and the ids of the prompt alone.
fn with_prompt(
    whole: TextEncoder,
    max_tokens: usize,
    prompt: &str,
    added: usize,
) -> Result<(TextEncoder, Vec<i64>), Error> {
    let prompt = trimmed(prompt);
    let ids: Vec<i64> =
        if prompt.is_empty() { Vec::new() } else { whole.encode(prompt)?.into_iter().map(i64::from).collect() };
    let room = max_tokens.saturating_sub(added);
    if room <= ids.len() {
        let taken = ids.len() + added - 1;
        return Err(Error::Mismatch(format!(
            "model.language.prompt: takes {taken} of task.max_text_tokens ({max_tokens}), which leaves no caption; raise it"
        )));
    }
    // A prompt that ends with a line break needs no space behind it.
    let between = if prompt.is_empty() || prompt.ends_with(char::is_whitespace) { "" } else { " " };
    Ok((whole.of_length(room)?.led_by(format!("{prompt}{between}")), ids))
}

/// A prompt without the space that separates it from what follows, which many tokenizers make a part of the next word.
pub(crate) fn trimmed(prompt: &str) -> &str {
    prompt.trim_end_matches(' ')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::TargetRule;
    use proptest::prelude::*;
    use serde_json::json;

    const PROMPT: [i64; 2] = [7, 8];
    const END: i64 = 1;

    fn encoder() -> Arc<TextEncoder> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null, "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        });
        std::fs::write(&file, json.to_string()).unwrap();
        Arc::new(TextEncoder::from_file(&file, 9, false).unwrap())
    }

    fn batch(captions: &[Vec<i64>], first: u64) -> HostBatch {
        let IdRows { ids, lengths, width } = IdRows::padded(captions, 0, 1);
        let rows: Vec<u64> = (0..captions.len() as u64).map(|row| first + row).collect();
        HostBatch {
            position: first,
            size: captions.len(),
            image_size: 0,
            pixels: None,
            features: Vec::new(),
            input_ids: ids,
            lengths,
            text_len: width,
            sample_index: rows.clone(),
            image_id: rows.clone(),
            captions: vec![String::new(); captions.len()],
            answers: vec![Vec::new(); captions.len()],
            positions: rows,
            epoch: 0,
        }
    }

    fn frame(read_apart: Option<ReadApart>) -> TextFrame {
        let (prompt, after, end_tokens) = (PROMPT.into(), vec![END], vec![END]);
        TextFrame { encoder: encoder(), pad_id: 0, first: None, prompt, after, end_tokens, read_apart }
    }

    /// As the tokenizer gives them: with the prompt in front.
    fn prompted(captions: &[Vec<i64>]) -> Vec<Vec<i64>> {
        captions.iter().map(|caption| [PROMPT.as_slice(), caption].concat()).collect()
    }

    /// The rows without padding.
    fn rows<'a>(ids: &'a [i64], lengths: &'a [usize], width: usize) -> impl Iterator<Item = &'a [i64]> {
        lengths.iter().enumerate().map(move |(row, &length)| &ids[row * width..][..length])
    }

    fn captions() -> impl Strategy<Value = Vec<Vec<i64>>> {
        prop::collection::vec(prop::collection::vec(2..60i64, 0..12), 1..6)
    }

    proptest! {
        #[test]
        fn prefix_and_suffix_are_the_caption(captions in captions(), seed: u64, first in 0..1u64 << 40) {
            let apart = ReadApart { after: vec![END], split_seed: Some(seed) };
            let framed = frame(Some(apart)).frame(batch(&prompted(&captions), first), 1);
            let read: Vec<&[i64]> = rows(&framed.host.input_ids, &framed.host.lengths, framed.host.text_len).collect();
            let (ids, lengths, width) = framed.target_text();
            for (row, (written, caption)) in rows(ids, lengths, width).zip(&captions).enumerate() {
                let point = split_point(seed, first + row as u64, caption.len());
                prop_assert_eq!(read[row], [PROMPT.as_slice(), &caption[..point], &[END]].concat());
                prop_assert_eq!(written, [&caption[point..], &[END]].concat());
            }
            let targets: usize = captions.iter().zip(read).map(|(c, r)| c.len() + 1 - (r.len() - 3)).sum();
            prop_assert_eq!(framed.target_count(TargetRule { untargeted: 0 }), targets);
        }

        #[test]
        fn a_part_of_a_batch_is_framed_as_in_the_whole(captions in captions(), seed: u64) {
            let frame = frame(Some(ReadApart { after: vec![END], split_seed: Some(seed) }));
            let texts = prompted(&captions);
            let whole = frame.frame(batch(&texts, 5), 8);
            for row in 0..captions.len() {
                let alone = frame.frame(batch(&texts[row..=row], 5 + row as u64), 1);
                prop_assert_eq!(whole.rows(row..row + 1, 1), alone);
            }
        }
    }

    #[test]
    fn without_a_split_the_decoder_writes_all_of_the_caption() {
        let frame = frame(Some(ReadApart { after: vec![END], split_seed: None }));
        let framed = frame.frame(batch(&[vec![3, 4, 5], vec![6]], 0), 1);
        assert_eq!(framed.host.input_ids, [7, 8, 1, 7, 8, 1]);
        let written = framed.written.clone().unwrap();
        assert_eq!((written.ids.as_slice(), written.width), ([3, 4, 5, 1, 6, 1, 0, 0].as_slice(), 4));
        let rule = TargetRule { untargeted: frame.untargeted() };
        assert_eq!(framed.labels(rule), [3, 4, 5, 1, 6, 1, -100, -100]);
        assert_eq!((frame.prompt(), framed.target_count(rule)), (vec![7, 8, 1], 6));
    }

    #[test]
    fn a_decoder_s_targets_stand_behind_its_prompt() {
        let frame = frame(None);
        let texts = prompted(&[vec![3, 4], vec![6]]);
        let framed = frame.frame(batch(&texts, 0), 1);
        assert_eq!(framed.host.input_ids, [7, 8, 3, 4, 1, 7, 8, 6, 1, 0]);
        let rule = TargetRule { untargeted: frame.untargeted() };
        assert_eq!(framed.labels(rule), [-100, -100, 3, 4, 1, -100, -100, 6, 1, -100]);
        assert_eq!((frame.prompt(), framed.target_count(rule)), (vec![7, 8], 5));
        let wide = frame.frame(batch(&texts, 0), 8);
        assert_eq!((wide.host.text_len, wide.host.lengths), (8, vec![5, 4]));
    }
}
