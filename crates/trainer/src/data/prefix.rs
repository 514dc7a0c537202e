//! Prefix language modelling (BLIP-2, section 3.3): where a caption is cut in two for an encoder-decoder.

use crate::data::batch::keyed_uniform;

/// Keeps the cuts apart from the other uniform numbers of a stream position.
const PREFIX_SEED: u64 = 0x6A09_E667_F3BC_C908;

/// How many of a caption's tokens the encoder reads; the decoder writes the others.
///
/// Uniform from 1 to the middle, rounded down, as a function of seed and stream position. A caption of a single token has nothing to be cut:
/// 0.
pub fn split_point(seed: u64, position: u64, tokens: usize) -> usize {
    let middle = tokens / 2;
    if middle == 0 {
        return 0;
    }
    let draw = f64::from(keyed_uniform(seed ^ PREFIX_SEED, position, 0)) * middle as f64;
    1 + (draw as usize).min(middle - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_lies_from_1_to_the_middle(seed: u64, position: u64, tokens in 2..2000usize) {
            let point = split_point(seed, position, tokens);
            prop_assert!((1..=tokens / 2).contains(&point), "{point} of {tokens}");
        }
    }

    /// Else a run that goes on under a newer program would cut its captions elsewhere.
    #[test]
    fn the_cut_of_a_position_never_changes() {
        let points = |seed| [0, 1, 2, 3, 4, 5, 6, 7].map(|position| split_point(seed, position, 20));
        assert_eq!(points(42), [1, 10, 1, 2, 9, 5, 6, 4]);
        assert_eq!(points(7), [4, 6, 6, 6, 5, 5, 9, 7]);
        assert_eq!(split_point(42, 1_000_000, 31), 6);
    }

    #[test]
    fn it_covers_the_range_evenly_and_seeds_and_positions_differ() {
        const TOKENS: usize = 20;
        for seed in [0, 1, u64::MAX] {
            let mut counts = [0; TOKENS / 2];
            let points: Vec<usize> = (0..10_000).map(|position| split_point(seed, position, TOKENS)).collect();
            points.iter().for_each(|point| counts[point - 1] += 1);
            // 1000 are expected of each, with a standard deviation of 30.
            assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
            let other: Vec<usize> = (0..10_000).map(|position| split_point(seed ^ 2, position, TOKENS)).collect();
            assert_ne!(points, other);
        }
    }

    #[test]
    fn short_captions() {
        assert_eq!([0, 1, 2, 3].map(|tokens| split_point(0, 0, tokens)), [0, 0, 1, 1]);
    }
}
