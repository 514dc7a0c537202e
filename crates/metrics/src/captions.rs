//! How much generated captions say, and how much of it is right.

use std::collections::HashSet;

use serde::Serialize;
use thiserror::Error;

/// Captions that cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CaptionError {
    /// One caption needs one reference.
    #[error("captions: expected one reference for each of {captions} captions, got {references}")]
    Count {
        /// Number of captions.
        captions: usize,
        /// Number of references.
        references: usize,
    },
}

/// What a set of generated captions looks like beside its references.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaptionSummary {
    /// Number of captions.
    pub captions: usize,
    /// How many of them differ from each other; 1 means that the same sentence stands under every picture.
    pub distinct: usize,
    /// How many equal their reference.
    pub exact: usize,
    /// Mean share of a reference's distinct words that its caption contains.
    pub word_overlap: f64,
}

/// Compares each caption with the reference at its place; words are what whitespace separates.
///
/// A reference without words is covered by a caption without words (overlap 1) and by no other (0). No captions at all
/// give zeros.
///
/// # Errors
/// The two slices have different lengths.
pub fn summarize_captions<C, R>(captions: &[C], references: &[R]) -> Result<CaptionSummary, CaptionError>
where
    C: AsRef<str>,
    R: AsRef<str>,
{
    if captions.len() != references.len() {
        return Err(CaptionError::Count { captions: captions.len(), references: references.len() });
    }
    let pairs = || captions.iter().map(AsRef::as_ref).zip(references.iter().map(AsRef::as_ref));
    let overlap: f64 = pairs().map(|(caption, reference)| word_overlap(caption, reference)).sum();
    Ok(CaptionSummary {
        captions: captions.len(),
        distinct: captions.iter().map(AsRef::as_ref).collect::<HashSet<&str>>().len(),
        exact: pairs().filter(|(caption, reference)| caption == reference).count(),
        word_overlap: overlap / captions.len().max(1) as f64,
    })
}

fn word_overlap(caption: &str, reference: &str) -> f64 {
    let said: HashSet<&str> = caption.split_whitespace().collect();
    let truth: HashSet<&str> = reference.split_whitespace().collect();
    if truth.is_empty() {
        return if said.is_empty() { 1.0 } else { 0.0 };
    }
    said.intersection(&truth).count() as f64 / truth.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_distinct_exact_and_overlap() {
        let said = ["red apple", "red apple", "a green pear tree"];
        let truth = ["red apple", "red cherry", "pear tree"];
        let summary = summarize_captions(&said, &truth).unwrap();
        assert_eq!((summary.captions, summary.distinct, summary.exact), (3, 2, 1));
        assert!((summary.word_overlap - (1.0 + 0.5 + 1.0) / 3.0).abs() < 1e-12);
    }

    #[test]
    fn repeated_words_count_once() {
        assert_eq!(word_overlap("red red red", "red red apple"), 0.5);
    }

    #[test]
    fn empty_strings_and_empty_sets() {
        assert_eq!(word_overlap("", " "), 1.0);
        assert_eq!(word_overlap("apple", ""), 0.0);
        let none: [&str; 0] = [];
        assert_eq!(summarize_captions(&none, &none).unwrap().word_overlap, 0.0);
    }

    #[test]
    fn different_lengths_are_an_error() {
        let error = summarize_captions(&["a"], &["a", "b"]).unwrap_err();
        assert_eq!(error.to_string(), "captions: expected one reference for each of 1 captions, got 2");
    }
}
