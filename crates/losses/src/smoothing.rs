//! What label smoothing leaves of a loss at best.

/// The cross-entropy of a perfect prediction under label smoothing over `classes`: the entropy of the smoothed target (PyTorch's semantics:
/// the true class has `1 - s + s/classes`, every other `s/classes`).
pub fn smoothed_floor(classes: f64, smoothing: f64) -> f64 {
    let other = smoothing / classes;
    let own = 1.0 - smoothing + other;
    let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    term(own) + (classes - 1.0) * term(other)
}

#[cfg(test)]
mod tests {
    use super::smoothed_floor;

    #[test]
    fn floors_of_the_paper_s_batches() {
        for (classes, floor) in [(64.0, 0.730), (1024.0, 1.017), (1600.0, 1.062), (30_523.0, 1.358)] {
            assert!((smoothed_floor(classes, 0.1) - floor).abs() < 1e-3, "{classes}");
        }
        assert_eq!(smoothed_floor(10.0, 0.0), 0.0);
    }
}
