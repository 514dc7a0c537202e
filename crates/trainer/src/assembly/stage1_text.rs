//! Stage 1's tokenizer, which must suit the Q-Former's text half.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{SpecialTokens, TextEncoder};
use blip2_model::qformer::QFormerConfig;

use crate::data::text::TextFrame;
use crate::error::{Error, Mistakes};

/// Captions to ids, by the tokenizer in `folder` and of at most `max_tokens`.
///
/// # Errors
/// More tokens than there are positions or ids, a tokenizer that does not frame its texts or has nothing to fill them with; all at once.
pub(super) fn stage1_text(folder: &Path, max_tokens: usize, qformer: &QFormerConfig) -> Result<TextFrame, Error> {
    let mut wrong = Mistakes::default();
    let fits = wrong.take(check_positions(max_tokens, qformer.max_position_embeddings as usize));
    let encoder = TextEncoder::from_folder(folder, max_tokens, true);
    let Some(encoder) = wrong.take(encoder.map_err(Error::Text)) else { return Err(wrong.into_error()) };
    let known = wrong.take(check_vocabulary(folder, &encoder, qformer.vocab_size));
    let pad = wrong.take(pad_id(folder, &encoder));
    match (fits, known, pad) {
        (Some(()), Some(()), Some(pad)) => Ok(TextFrame::plain(Arc::new(encoder), pad)),
        _ => Err(wrong.into_error()),
    }
}

fn check_positions(max_tokens: usize, max: usize) -> Result<(), Error> {
    if max_tokens <= max {
        return Ok(());
    }
    let expected = format!("at most the Q-Former's max_position_embeddings of {max}");
    Err(Error::key("task.max_text_tokens", expected, max_tokens, ""))
}

fn check_vocabulary(folder: &Path, encoder: &TextEncoder, vocabulary: i64) -> Result<(), Error> {
    let ids = encoder.vocab_size() as i64;
    if ids <= vocabulary {
        return Ok(());
    }
    Err(Error::file(folder, format!("the tokenizer has {ids} tokens, the model's vocabulary {vocabulary}")))
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
