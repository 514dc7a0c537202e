//! What a model that knows nothing scores, and the least a loss with label smoothing can reach.

/// Recall at `k` of a random order over `candidates` of which one is right.
pub fn chance_recall(k: usize, candidates: usize) -> f64 {
    if candidates == 0 {
        return 0.0;
    }
    k.min(candidates) as f64 / candidates as f64
}

/// The contrastive loss of a model that gives `candidates` the same similarity (BLIP-2, section 3.2): `ln candidates`.
pub fn itc_chance(candidates: usize) -> f64 {
    (candidates.max(1) as f64).ln()
}

/// The matching loss of a model that knows only that one pair in three is positive: the entropy of (1/3, 2/3).
pub fn itm_chance() -> f64 {
    3f64.ln() - 2.0 / 3.0 * 2f64.ln()
}

/// The least cross-entropy over `classes` with `smoothing` spread over all of them: the smoothed target's own entropy.
pub fn smoothed_floor(smoothing: f64, classes: usize) -> f64 {
    if classes < 2 {
        return 0.0;
    }
    let rest = smoothing / classes as f64;
    let right = 1.0 - smoothing + rest;
    entropy_term(right) + (classes - 1) as f64 * entropy_term(rest)
}

fn entropy_term(p: f64) -> f64 {
    if p > 0.0 { -p * p.ln() } else { 0.0 }
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

    #[test]
    fn itm_chance_is_the_entropy_of_one_in_three() {
        let (p, q) = (1.0 / 3.0f64, 2.0 / 3.0f64);
        assert!((itm_chance() - (-p * p.ln() - q * q.ln())).abs() < 1e-12);
    }

    #[test]
    fn no_smoothing_has_floor_zero_and_full_smoothing_has_chance() {
        assert_eq!(smoothed_floor(0.0, 16), 0.0);
        assert!((smoothed_floor(1.0, 16) - itc_chance(16)).abs() < 1e-12);
    }

    #[test]
    fn smoothed_floor_by_hand() {
        // Two classes, smoothing 0.1: targets 0.95 and 0.05.
        let by_hand = -(0.95 * 0.95f64.ln()) - 0.05 * 0.05f64.ln();
        assert!((smoothed_floor(0.1, 2) - by_hand).abs() < 1e-12);
    }
}
