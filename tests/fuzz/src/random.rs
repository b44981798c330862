//! Numbers for inputs: a function of a seed and an input's number, so that any input can be made again by itself.

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of input `index` of the campaign `seed`.
    pub fn new(seed: u64, index: u64) -> Random {
        let mut random = Random(seed ^ index.wrapping_mul(0xD134_2543_DE82_EF95));
        // Neighbouring numbers must not begin alike.
        random.0 = random.bits() ^ index.rotate_left(32);
        random
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 where that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// Whether one of `out_of` happened.
    pub fn one_in(&mut self, out_of: usize) -> bool {
        self.below(out_of) == 0
    }

    /// One of `choices`, of which there must be some.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// A length: small ones are likelier, by powers of two up to `max`.
    pub fn length(&mut self, max: usize) -> usize {
        let bits = self.below(max.max(1).ilog2() as usize + 1) + 1;
        (self.bits() as usize & ((1 << bits) - 1)).min(max)
    }

    /// A number that breaks things: about a power of two, about the largest of its kind, or about `near`.
    pub fn odd_number(&mut self, near: u64) -> u64 {
        let base = match self.below(8) {
            0 => 0,
            1 => near,
            2 => near.wrapping_mul(2),
            3 => u64::MAX,
            4 => i64::MAX as u64,
            5 => u64::from(u32::MAX),
            _ => 1 << self.below(64),
        };
        base.wrapping_add(self.below(5) as u64).wrapping_sub(2)
    }
}
