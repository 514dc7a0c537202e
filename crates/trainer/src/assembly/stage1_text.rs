//! Stage 1's tokenizer, which must suit the Q-Former's text half.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{SpecialTokens, TextEncoder};
use blip2_model::qformer::QFormerConfig;

use crate::data::text::TextFrame;
use crate::error::Error;

/// Captions to ids, by the tokenizer in `folder` and of at most `max_tokens`.
///
/// # Errors
/// More tokens than there are positions or ids, a tokenizer that does not frame its texts or has nothing to fill them with.
pub(super) fn stage1_text(folder: &Path, max_tokens: usize, qformer: &QFormerConfig) -> Result<TextFrame, Error> {
    let max = qformer.max_position_embeddings as usize;
    if max_tokens > max {
        let expected = format!("at most the Q-Former's max_position_embeddings of {max}");
        return Err(Error::key("task.max_text_tokens", expected, max_tokens, ""));
    }
    let encoder = TextEncoder::from_folder(folder, max_tokens, true)?;
    let ids = encoder.vocab_size() as i64;
    if ids > qformer.vocab_size {
        let message = format!("the tokenizer has {ids} tokens, the model's vocabulary {}", qformer.vocab_size);
        return Err(Error::file(folder, message));
    }
    let pad = pad_id(folder, &encoder)?;
    Ok(TextFrame::plain(Arc::new(encoder), pad))
}

/// The id that fills stage 1's texts. The tokenizer must frame a text, for ITC reads its first token, ITG begins there and learns to end.
fn pad_id(folder: &Path, encoder: &TextEncoder) -> Result<i64, Error> {
    let special = SpecialTokens::of(folder)?;
    if encoder.encode("")?.len() != 2 {
        let (begin, end) = (special.begin, special.end);
        return Err(Error::file(
            folder,
            format!(
                "expected a tokenizer that puts {begin} in front of a text and {end} behind it; its post_processor does not"
            ),
        ));
    }
    let missing = || {
        Error::file(
            folder,
            format!(
                "its tokenizer has no token {}; name the one that fills texts as pad_token in special_tokens_map.json",
                special.pad
            ),
        )
    };
    encoder.token_id(&special.pad).map(i64::from).ok_or_else(missing)
}
