//! Which data set of a mixture a lane position draws from: a fixed sequence that is repeated for ever.
//!
//! Weights become whole numbers `w_d`, their sum is the period `P`, and in every period data set `d` is drawn `w_d` times.
//! Inside it the draws are spread by Tijdeman's algorithm for the chairman assignment problem (R. Tijdeman, 1980): after
//! any `n` draws each of the `k` sets has had its share `n w_d / P` to within `1 - 1/(2k - 2)`, so never a whole draw too
//! many or too few.

use crate::order::OrderError;

/// The longest sequence that is kept, a byte or two a place.
const MAX_PERIOD: u64 = 1 << 24;
/// Draws are counted in advance up to every so many places.
const BLOCK: usize = 256;

/// The repeated sequence of data sets.
#[derive(Debug)]
pub struct Interleave {
    /// Draws of each set in a period.
    counts: Vec<u64>,
    /// The set at each place of the period.
    sets: Vec<u16>,
    /// `before[b * k + d]`: draws of set `d` in front of place `b * BLOCK`.
    before: Vec<u32>,
}

impl Interleave {
    /// The sequence of data sets with these weights.
    ///
    /// # Errors
    /// When there is no weight, one is not a positive number, or they need a period of more than 2^24 draws.
    pub fn new(weights: &[f64]) -> Result<Interleave, OrderError> {
        let counts = whole_numbers(weights)?;
        let period: u64 = counts.iter().sum();
        let mut drawn = vec![0u64; counts.len()];
        let mut sets = Vec::with_capacity(period as usize);
        let mut before = Vec::new();
        for place in 0..period {
            if (place as usize).is_multiple_of(BLOCK) {
                before.extend(drawn.iter().map(|&n| n as u32));
            }
            let set = next(&counts, &drawn, place + 1, period);
            drawn[set] += 1;
            sets.push(set as u16);
        }
        Ok(Interleave { counts, sets, before })
    }

    /// Draws after which the sequence begins again.
    pub fn period(&self) -> u64 {
        self.sets.len() as u64
    }

    /// The set that is drawn at `position` of a lane, and how many draws that set has had in the lane before.
    pub fn at(&self, position: u64) -> (usize, u64) {
        let set = usize::from(self.sets[(position % self.period()) as usize]);
        (set, self.drawn(set, position))
    }

    /// How many of a lane's first `positions` draws are of `set`.
    pub fn drawn(&self, set: usize, positions: u64) -> u64 {
        let place = (positions % self.period()) as usize;
        let block = place / BLOCK;
        let counted = u64::from(self.before[block * self.counts.len() + set]);
        let since = self.sets[block * BLOCK..place].iter().filter(|&&other| usize::from(other) == set).count();
        positions / self.period() * self.counts[set] + counted + since as u64
    }
}

/// Tijdeman's choice for the `n`-th draw: of the sets that may be drawn without running ahead of their share, the one
/// whose share would soonest be a whole draw short.
fn next(counts: &[u64], drawn: &[u64], n: u64, period: u64) -> usize {
    let k = counts.len() as i128;
    if k == 1 {
        return 0;
    }
    let (n, period, slack) = (i128::from(n), i128::from(period), 2 * k - 2);
    // What set d is owed, in units of a draw over P.
    let owed = |d: usize| i128::from(counts[d]) * n - i128::from(drawn[d]) * period;
    // (1 - 1/slack - owed/P) / (w/P), over the common denominator.
    let urgency = |d: usize| ((slack - 1) * period - slack * owed(d), i128::from(counts[d]));
    (0..counts.len())
        .filter(|&d| slack * owed(d) >= period)
        .min_by(|&a, &b| {
            let ((a, a_weight), (b, b_weight)) = (urgency(a), urgency(b));
            (a * b_weight).cmp(&(b * a_weight))
        })
        .expect("what is owed sums to one draw, so some set is owed a share of it")
}

/// The smallest whole numbers in the proportion of the weights, as these are written in decimal.
fn whole_numbers(weights: &[f64]) -> Result<Vec<u64>, OrderError> {
    let refuse = |reason: String| OrderError::Weights { weights: weights.to_vec(), reason };
    if weights.is_empty() || weights.len() > usize::from(u16::MAX) {
        return Err(refuse(format!("expected 1 to {} of them", u16::MAX)));
    }
    if let Some(wrong) = weights.iter().find(|weight| !(weight.is_finite() && **weight > 0.0)) {
        return Err(refuse(format!("each must be a number above 0, got {wrong}")));
    }
    if weights.len() == 1 {
        return Ok(vec![1]);
    }
    let too_long = || {
        refuse(format!(
            "they need a period of more than {MAX_PERIOD} draws; write them with fewer digits, as 0.7 and 0.3"
        ))
    };
    // The shortest decimal that is read back as this number is what was written in the file.
    let written: Vec<String> = weights.iter().map(|weight| format!("{weight}")).collect();
    let decimals = |text: &String| text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let digits = written.iter().map(decimals).max().unwrap_or(0);
    let scaled = |text: &String| {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        format!("{whole}{decimals:0<digits$}").parse::<u128>().ok()
    };
    let scaled: Vec<u128> = written.iter().map(scaled).collect::<Option<_>>().ok_or_else(too_long)?;
    let divisor = scaled.iter().copied().fold(0, greatest_common_divisor);
    let counts: Vec<u64> =
        scaled.iter().map(|n| u64::try_from(n / divisor).ok()).collect::<Option<_>>().ok_or_else(too_long)?;
    match counts.iter().try_fold(0u64, |sum, n| sum.checked_add(*n)) {
        Some(period) if period <= MAX_PERIOD => Ok(counts),
        _ => Err(too_long()),
    }
}

fn greatest_common_divisor(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sequence_of_some_weights_never_changes() {
        let sequence = |weights: &[f64]| Interleave::new(weights).unwrap().sets;
        assert_eq!(sequence(&[2.5]), [0]);
        assert_eq!(sequence(&[1.0, 1.0]), [0, 1]);
        assert_eq!(sequence(&[0.75, 0.25]), [0, 0, 1, 0]);
        assert_eq!(sequence(&[0.5, 0.3, 0.2]), [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]);
    }

    #[test]
    fn weights_are_taken_as_they_are_written() {
        assert_eq!(whole_numbers(&[0.1, 0.2]).unwrap(), [1, 2]);
        assert_eq!(whole_numbers(&[115e6, 14e6, 1.5e6]).unwrap(), [230, 28, 3]);
        assert_eq!(whole_numbers(&[1e-3, 1.0]).unwrap(), [1, 1000]);
        assert_eq!(whole_numbers(&[0.333, 0.667]).unwrap(), [333, 667]);
    }

    #[test]
    fn weights_without_a_sequence_are_refused() {
        for (weights, reason) in [
            (vec![], "expected 1"),
            (vec![1.0, 0.0], "above 0, got 0"),
            (vec![1.0, f64::NAN], "above 0, got NaN"),
            (vec![0.123_456_789_1, 1.0], "fewer digits"),
            (vec![1e300, 1.0], "fewer digits"),
        ] {
            let error = Interleave::new(&weights).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_prefix_gives_each_set_its_share_to_within_a_draw(
            counts in prop::collection::vec(1u32..60, 1..7),
            periods in 0u64..3,
        ) {
            let weights: Vec<f64> = counts.iter().map(|&n| f64::from(n)).collect();
            let interleave = Interleave::new(&weights).unwrap();
            let total: f64 = weights.iter().sum();
            let mut drawn = vec![0u64; counts.len()];
            for position in 0..interleave.period() * (periods + 1) {
                let (set, before) = interleave.at(position);
                prop_assert_eq!(before, drawn[set]);
                drawn[set] += 1;
                for (d, &n) in drawn.iter().enumerate() {
                    let share = (position + 1) as f64 * weights[d] / total;
                    prop_assert!((n as f64 - share).abs() < 1.0, "{} draws of set {d}, share {share}", n);
                    prop_assert_eq!(interleave.drawn(d, position + 1), n);
                }
            }
        }
    }
}
