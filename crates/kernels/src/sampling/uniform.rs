//! The number that a draw compares with, from the counter-based generator.

use ashlar_vocabulary::random::{Purpose, random_bits};

/// A number in [0, 1) with 53 random bits, a function of the arguments alone: key `seed` (low word first), counter
/// (position, choice index, 0, 0), of the result the first two words.
pub fn uniform(seed: u64, choice_index: u32, position: u32) -> f64 {
    let bits = random_bits(seed, Purpose::Sampling, [position, choice_index]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_differ_by_every_key() {
        let mean = (0..10_000).map(|position| uniform(7, 0, position)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let some =
            [uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1), uniform(1 << 32, 0, 0)];
        assert!((0..5).all(|i| (0..i).all(|j| some[i] != some[j])));
        assert!(some.iter().all(|u| (0.0..1.0).contains(u)));
    }
}
