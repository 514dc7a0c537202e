//! Keyed hashing, uniform numbers and permutations whose values never change.
//!
//! The order of a training set and every augmentation come from these few lines, so a change here would change what
//! a seed means. The tests pin their values.

const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64: a bijection of 64 bits in which every input bit moves half of the output bits.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A 64-bit key from a seed and the numbers that say what it is for.
pub(crate) fn key(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(mix(seed.wrapping_add(GOLDEN_RATIO)), |state, part| {
        mix(state.rotate_left(25) ^ mix(part.wrapping_add(GOLDEN_RATIO)))
    })
}

/// A stream of uniform numbers under one key (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct KeyedRng {
    state: u64,
}

impl KeyedRng {
    /// The stream that belongs to `key`.
    pub(crate) fn new(key: u64) -> Self {
        Self { state: key }
    }

    fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_RATIO);
        mix(self.state)
    }

    /// Uniform in [0, 1), with 53 bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [low, high).
    pub(crate) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Uniform in 0..bound; `bound` is small beside 2^64, so that the bias of the product is below 2^-32.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u32
    }
}

/// A keyed permutation of 0..len that needs no memory: a Feistel network over the next even power of two, walked
/// along its cycle until it lands inside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permutation {
    len: u64,
    key: u64,
    half_bits: u32,
}

impl Permutation {
    const ROUNDS: u64 = 8;

    /// The permutation of 0..len under `key`.
    pub(crate) fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, key, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `value` (below `len`) goes.
    pub(crate) fn apply(&self, value: u64) -> u64 {
        debug_assert!(value < self.len);
        // At most four times as many values as places, so this ends after four rounds on average.
        let mut value = self.encrypt(value);
        while value >= self.len {
            value = self.encrypt(value);
        }
        value
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..Self::ROUNDS {
            let f = mix(self.key.wrapping_add(round.wrapping_mul(GOLDEN_RATIO)) ^ mix(right + 1));
            (left, right) = (right, left ^ (f >> 32) & mask);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_never_change() {
        let permutation = Permutation::new(10, key(42, &[1, 2, 3]));
        let mut rng = KeyedRng::new(key(7, &[]));
        let found = (
            key(0, &[]),
            key(42, &[1, 2, 3]),
            (0..10).map(|i| permutation.apply(i)).collect::<Vec<_>>(),
            (rng.below(1000), rng.below(1000), rng.uniform(-1.0, 1.0)),
        );
        let expected = (
            0xE220_A839_7B1D_CDAF, // SplitMix64's published first output for seed 0
            3_899_964_022_556_787_745,
            vec![2, 7, 0, 1, 6, 5, 4, 8, 9, 3],
            (721, 649, 0.098_748_649_838_647_84),
        );
        assert_eq!(found, expected);
    }

    #[test]
    fn a_key_depends_on_each_part_and_on_their_order() {
        let keys = [key(1, &[2, 3]), key(1, &[3, 2]), key(2, &[2, 3]), key(1, &[2]), key(1, &[2, 3, 0])];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn every_sample_is_about_as_likely_at_every_place() {
        let len = 7u64;
        let mut counts = [[0u32; 7]; 7];
        for seed in 0..7000 {
            let permutation = Permutation::new(len, key(seed, &[]));
            for i in 0..len {
                counts[i as usize][permutation.apply(i) as usize] += 1;
            }
        }
        // 1000 expected, standard deviation 29.
        assert!(counts.iter().flatten().all(|&n| (850..1150).contains(&n)), "{counts:?}");
    }

    #[test]
    fn below_is_uniform() {
        let mut rng = KeyedRng::new(5);
        let mut counts = [0u32; 5];
        (0..50_000).for_each(|_| counts[rng.below(5) as usize] += 1);
        assert!(counts.iter().all(|&n| (9_600..10_400).contains(&n)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn a_permutation_hits_every_value_once(len in 1u64..5000, key: u64) {
            let permutation = Permutation::new(len, key);
            let mut seen = vec![false; len as usize];
            for i in 0..len {
                seen[permutation.apply(i) as usize] = true;
            }
            prop_assert!(seen.into_iter().all(|s| s));
        }
    }
}
