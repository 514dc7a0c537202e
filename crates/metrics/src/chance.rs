//! What a model that knows nothing scores.

/// Recall at `k` of a random order over `candidates` of which one is right.
pub fn chance_recall(k: usize, candidates: usize) -> f64 {
    if candidates == 0 {
        return 0.0;
    }
    k.min(candidates) as f64 / candidates as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_recall_is_the_share_of_candidates_looked_at() {
        assert_eq!(chance_recall(1, 185), 1.0 / 185.0);
        assert_eq!(chance_recall(10, 4), 1.0);
        assert_eq!(chance_recall(1, 0), 0.0);
    }
}
