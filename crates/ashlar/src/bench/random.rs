//! Reproducible randomness: a stream is named by a seed and a purpose.

/// SplitMix64; good enough for loads and token ids, and the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream `purpose` of `seed`. Streams of different purposes are unrelated.
    pub(crate) fn new(seed: u64, purpose: u64) -> Random {
        let mut outer = Random(seed);
        let start = outer.next() ^ purpose.wrapping_mul(0xD134_2543_DE82_EF95);
        let mut random = Random(start);
        random.next();
        random
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0…1, 1 excluded.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low).saturating_add(1);
        low + ((u128::from(self.next()) * u128::from(span)) >> 64) as u64
    }

    /// Exponential with this mean: the gaps of a Poisson process.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -(1.0 - self.unit()).ln() * mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_and_purpose_alone() {
        let take = |seed, purpose| -> Vec<u64> {
            let mut random = Random::new(seed, purpose);
            (0..4).map(|_| random.next()).collect()
        };
        assert_eq!(take(1, 2), take(1, 2));
        assert_ne!(take(1, 2), take(1, 3));
        assert_ne!(take(1, 2), take(2, 2));
    }

    #[test]
    fn ranges_and_means_are_as_asked() {
        let mut random = Random::new(7, 0);
        let mut seen = [0; 3];
        (0..300).for_each(|_| seen[random.between(5, 7) as usize - 5] += 1);
        assert!(seen.iter().all(|&count| count > 60), "{seen:?}");
        let mean = (0..20_000).map(|_| random.exponential(0.25)).sum::<f64>() / 20_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }
}
