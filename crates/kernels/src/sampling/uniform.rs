//! The number that a draw compares with, from the counter-based generator.

use ashlar_vocabulary::random::{Purpose, random_bits};

/// A number in [0, 1) with 53 random bits, a function of the arguments alone: key `seed` (low word first), counter
/// (position, choice index, 0, 0), of the result the first two words.
pub fn uniform(seed: u64, choice_index: u32, position: u32) -> f64 {
    let bits = random_bits(seed, Purpose::Sampling, [position, choice_index]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
