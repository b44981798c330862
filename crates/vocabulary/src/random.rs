//! Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//!
//! There is no state: a number is a function of a key and a counter, so that whoever needs it computes it, in any order.

/// What a number is for, the third word of its counter: equal seeds give unrelated numbers to different purposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Sampling of tokens.
    Sampling = 0,
    /// The order of training samples.
    Order = 1,
    /// The choice of samples for validation.
    Split = 2,
    /// What an adapter starts from.
    Initial = 3,
    /// What a model starts from.
    InitialModel = 4,
    /// Which inputs of an adapter are zero in a step.
    Dropout = 5,
    /// Names of parts of an answer.
    Names = 6,
}

/// Ten rounds of Philox over a counter, with a key of 64 bits (low word first).
#[inline]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let first = u64::from(counter[0]) * 0xD251_1F53;
        let second = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
    }
    counter
}

/// 64 random bits: key `seed` (low word first), counter (`place`, purpose, 0), of the result the first two words, low word first.
#[inline]
pub fn random_bits(seed: u64, purpose: Purpose, place: [u32; 2]) -> u64 {
    let counter = [place[0], place[1], purpose as u32, 0];
    let [low, high, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    u64::from(high) << 32 | u64::from(low)
}

/// A number below `bound`: the high half of the product with 64 random bits. No number is likelier than another by more than
/// `bound` in 2⁶⁴. 0 where `bound` is 0.
#[inline]
pub fn random_below(bound: u64, seed: u64, purpose: Purpose, place: [u32; 2]) -> u64 {
    ((u128::from(random_bits(seed, purpose, place)) * u128::from(bound)) >> 64) as u64
}

/// The key of a sequence's dropout in a step, by which [`philox`] makes its masks: of the seed, the step, the sample's number in the
/// training file, and the sequence's within the sample. Not of where in a batch or micro-batch it comes.
pub fn dropout_key(seed: u64, step: u64, sample: u32, sequence: u32) -> [u32; 2] {
    let of_step = random_bits(seed, Purpose::Dropout, [step as u32, (step >> 32) as u32]);
    let key = random_bits(of_step, Purpose::Dropout, [sample, sequence]);
    [key as u32, (key >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_test_vectors_come_out() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn numbers_stay_below_their_bound_and_differ_by_seed_purpose_and_place() {
        for bound in [1, 2, 7, u64::MAX] {
            assert!((0..100).all(|i| random_below(bound, 3, Purpose::Order, [i, 0]) < bound));
        }
        assert_eq!(random_below(0, 3, Purpose::Order, [0, 0]), 0);
        let some = [
            random_bits(1, Purpose::Order, [0, 0]),
            random_bits(1 << 32, Purpose::Order, [0, 0]),
            random_bits(1, Purpose::Split, [0, 0]),
            random_bits(1, Purpose::Order, [1, 0]),
            random_bits(1, Purpose::Order, [0, 1]),
        ];
        assert!((0..5).all(|i| (0..i).all(|j| some[i] != some[j])));
    }
}
