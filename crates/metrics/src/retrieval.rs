//! Recall at k of image-to-text and text-to-image retrieval.
//!
//! An image and a text match when they carry the same id, so that an image may have several captions and a set may hold
//! an image twice. A query counts as found at k when fewer than k wrong candidates come before its best right one; other
//! right candidates never stand in its way.
//!
//! **Ties are broken against the model**: a wrong candidate with the same similarity comes first. A collapsed model that
//! gives every pair one value therefore scores 0, not by the luck of a sort's order. NaN is never a good similarity for
//! the right candidate and always one for a wrong candidate.

use std::collections::HashSet;

use serde::Serialize;
use thiserror::Error;

/// Similarities or scores that recall cannot be computed from.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RetrievalError {
    /// The matrix is not images x texts.
    #[error("retrieval: expected {images} x {texts} = {} similarities, got {got}", images * texts)]
    Shape {
        /// Number of images (rows).
        images: usize,
        /// Number of texts (columns).
        texts: usize,
        /// Number of values given.
        got: usize,
    },
    /// An image or a text that nothing in the other set matches can never be found.
    #[error("retrieval: {kind} {index} has id {id}, which no {other} has; keep only pairs that are complete")]
    NoMatch {
        /// `image` or `text`: what the query is.
        kind: &'static str,
        /// The query's row or column.
        index: usize,
        /// The query's id.
        id: u64,
        /// What was searched.
        other: &'static str,
    },
    /// Re-ranking with the scores of other pairs than those asked for.
    #[error("retrieval: expected matching scores of {expected} pairs of {images} images, got {got}")]
    Matching {
        /// Number of images.
        images: usize,
        /// Number of pairs.
        expected: usize,
        /// Number of scores given.
        got: usize,
    },
}

/// Shares of queries (0 to 1) found among the first `k`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Recall {
    /// How many candidates are looked at.
    pub k: usize,
    /// Share of images whose text is found.
    pub image_to_text: f64,
    /// Share of texts whose image is found.
    pub text_to_image: f64,
}

impl Recall {
    /// Mean of both directions.
    pub fn mean(&self) -> f64 {
        (self.image_to_text + self.text_to_image) / 2.0
    }
}

/// Recall at each of `ks`, in both directions.
///
/// # Shapes
/// `similarity`: row-major `[image_ids.len(), text_ids.len()]`, larger is more alike.
///
/// # Errors
/// The matrix has another size, or a query has no right candidate.
pub fn recall_at(
    ks: &[usize],
    similarity: &[f32],
    image_ids: &[u64],
    text_ids: &[u64],
) -> Result<Vec<Recall>, RetrievalError> {
    check(similarity, image_ids, text_ids)?;
    let (images, texts) = (image_ids.len(), text_ids.len());
    let image_ranks: Vec<usize> =
        (0..images).map(|i| rank(image_ids[i], text_ids, |t| similarity[i * texts + t])).collect();
    let text_ranks: Vec<usize> =
        (0..texts).map(|t| rank(text_ids[t], image_ids, |i| similarity[i * texts + t])).collect();
    Ok(recall_of(ks, &image_ranks, &text_ranks))
}

/// A matrix that recall can be computed from.
pub(crate) fn check(similarity: &[f32], image_ids: &[u64], text_ids: &[u64]) -> Result<(), RetrievalError> {
    let (images, texts) = (image_ids.len(), text_ids.len());
    if images.checked_mul(texts) != Some(similarity.len()) {
        return Err(RetrievalError::Shape { images, texts, got: similarity.len() });
    }
    require_matches("image", image_ids, "text", text_ids)?;
    require_matches("text", text_ids, "image", image_ids)
}

/// Recall from the ranks of all images and of all texts.
pub(crate) fn recall_of(ks: &[usize], image_ranks: &[usize], text_ranks: &[usize]) -> Vec<Recall> {
    ks.iter()
        .map(|&k| Recall { k, image_to_text: share_below(image_ranks, k), text_to_image: share_below(text_ranks, k) })
        .collect()
}

/// How many wrong candidates come before the query's best right one. What compares with nothing, as a NaN, is no good score for a right
/// candidate and a better one for a wrong candidate.
pub(crate) fn rank<S: PartialOrd + Copy>(query: u64, candidates: &[u64], score: impl Fn(usize) -> S) -> usize {
    let right = (0..candidates.len()).filter(|&c| candidates[c] == query).map(&score);
    let best_right =
        right.filter(|s| s.partial_cmp(s).is_some()).reduce(|best, other| if best < other { other } else { best });
    let behind = |wrong: S| best_right.is_some_and(|right| wrong < right);
    (0..candidates.len()).filter(|&c| candidates[c] != query && !behind(score(c))).count()
}

fn share_below(ranks: &[usize], k: usize) -> f64 {
    ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len().max(1) as f64
}

fn require_matches(
    kind: &'static str,
    queries: &[u64],
    other: &'static str,
    candidates: &[u64],
) -> Result<(), RetrievalError> {
    let known: HashSet<u64> = candidates.iter().copied().collect();
    match queries.iter().position(|id| !known.contains(id)) {
        Some(index) => Err(RetrievalError::NoMatch { kind, index, id: queries[index], other }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recall(k: usize, similarity: &[f32], ids: &[u64]) -> Recall {
        recall_at(&[k], similarity, ids, ids).unwrap()[0]
    }

    #[test]
    fn by_hand_for_three_pairs() {
        // Row 0 finds its text first, row 1 second, row 2 last; columns: first, second, third.
        let s = [0.9, 0.1, 0.5, 0.6, 0.2, 0.1, 0.4, 0.3, 0.2];
        let ids = [7, 8, 9];
        let third = 1.0 / 3.0;
        assert_eq!(recall(1, &s, &ids), Recall { k: 1, image_to_text: third, text_to_image: third });
        assert_eq!(recall(2, &s, &ids).image_to_text, 2.0 * third);
        assert_eq!(recall(3, &s, &ids).mean(), 1.0);
    }

    #[test]
    fn a_collapsed_model_scores_zero() {
        assert_eq!(recall(1, &[0.5; 9], &[0, 1, 2]).mean(), 0.0);
        assert_eq!(recall(3, &[0.5; 9], &[0, 1, 2]).mean(), 1.0);
    }

    #[test]
    fn nan_never_helps() {
        let mut s = [0.0f32; 4];
        s[0] = f32::NAN;
        assert_eq!(recall(1, &s, &[0, 1]).image_to_text, 0.0);
        assert_eq!(recall(1, &[1.0, f32::NAN, 0.0, 1.0], &[0, 1]).image_to_text, 0.5);
    }

    #[test]
    fn several_captions_of_an_image_are_all_right() {
        // One image with two captions, one with one: the better caption counts, the other never stands before it.
        let s = [0.2, 0.9, 0.8, 0.1, 0.3, 0.2];
        let got = recall_at(&[1], &s, &[1, 2], &[1, 1, 2]).unwrap()[0];
        assert_eq!(got.image_to_text, 0.5);
        // Texts 0 and 1: images 0.2 vs 0.1 right, 0.9 vs 0.3 right; text 2: 0.8 vs 0.2 wrong.
        assert_eq!(got.text_to_image, 2.0 / 3.0);
    }

    #[test]
    fn wrong_sizes_and_incomplete_pairs_are_errors() {
        let shape = recall_at(&[1], &[0.0; 3], &[1, 2], &[1, 2]).unwrap_err();
        assert_eq!(shape.to_string(), "retrieval: expected 2 x 2 = 4 similarities, got 3");
        let lonely = recall_at(&[1], &[0.0; 2], &[1, 2], &[1]).unwrap_err();
        assert_eq!(lonely, RetrievalError::NoMatch { kind: "image", index: 1, id: 2, other: "text" });
    }

    /// Sorts all candidates, wrong ones first among equals, and looks for a right one among the first k kinds of answer.
    fn naive(k: usize, query: u64, candidates: &[u64], scores: &[f32]) -> bool {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by(|&a, &b| {
            scores[b].total_cmp(&scores[a]).then((candidates[a] == query).cmp(&(candidates[b] == query)))
        });
        order.iter().take(k).any(|&c| candidates[c] == query)
    }

    proptest! {
        #[test]
        fn equals_the_naive_sort(
            (images, texts, levels) in (1usize..6, 1usize..6).prop_flat_map(|(groups, extra)| {
                let texts: Vec<u64> = (0..groups + extra).map(|t| (t % groups) as u64).collect();
                let size = groups * texts.len();
                (Just((0..groups as u64).collect::<Vec<u64>>()), Just(texts), proptest::collection::vec(0u8..5, size))
            }),
            k in 1usize..7,
        ) {
            let s: Vec<f32> = levels.iter().map(|&l| f32::from(l)).collect();
            let got = recall_at(&[k], &s, &images, &texts).unwrap()[0];
            let rows = images.iter().enumerate()
                .filter(|&(i, &id)| naive(k, id, &texts, &s[i * texts.len()..(i + 1) * texts.len()])).count();
            let columns = texts.iter().enumerate().filter(|&(t, &id)| {
                let column: Vec<f32> = (0..images.len()).map(|i| s[i * texts.len() + t]).collect();
                naive(k, id, &images, &column)
            }).count();
            prop_assert_eq!(got.image_to_text, rows as f64 / images.len() as f64);
            prop_assert_eq!(got.text_to_image, columns as f64 / texts.len() as f64);
        }
    }
}
