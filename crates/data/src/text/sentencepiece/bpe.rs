//! The merges of a BPE model, which SentencePiece does not write down: it has scores of pieces.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;

/// Every way to join two pieces of `ids` into one of `vocabulary`, best score first, in the order that `transformers` gives them.
pub(super) fn merges<'a>(ids: &HashMap<&str, usize>, vocabulary: &'a [(String, f64)]) -> Vec<(&'a str, &'a str)> {
    let mut merges = Vec::new();
    for (piece, score) in vocabulary {
        let length = piece.chars().count();
        let mut own = Vec::new();
        for (characters, (place, _)) in piece.char_indices().enumerate().skip(1) {
            let (left, right) = piece.split_at(place);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                let rank = (*score, characters, length - characters);
                own.push(((left_id, right_id), rank, (left, right)));
            }
        }
        own.sort_by_key(|(ids, ..)| *ids);
        merges.extend(own.into_iter().map(|(_, rank, pair)| (rank, pair)));
    }
    // Stable: what is equal keeps its order, as in Python.
    merges.sort_by(|((score, left, right), _), ((other, other_left, other_right), _)| {
        let scores = other.partial_cmp(score).unwrap_or(Ordering::Equal);
        scores.then((Reverse(left), Reverse(right)).cmp(&(Reverse(other_left), Reverse(other_right))))
    });
    merges.into_iter().map(|(_, pair)| pair).collect()
}
