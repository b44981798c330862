//! The learning rate's course: a factor between 0 and 1 for every step.
//!
//! Every operation is one of IEEE 754's in `f64`, and the cosine is a polynomial of our own: a step has the same factor on every
//! machine.

use serde::{Deserialize, Serialize};

/// The course of a job's learning rate. Step *k* of *w* steps of warm-up has the factor (k + 1)/w; the decay follows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Steps in which it rises from 0.
    pub warmup_steps: u64,
    /// What follows.
    pub decay: Decay,
}

/// What comes after warm-up. With x from 0 at its first step towards 1 after the job's last:
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Decay {
    /// 1.
    Constant,
    /// From 1 down to `floor` in a straight line.
    Linear {
        /// What is left at the end, 0…1.
        floor: f64,
    },
    /// floor + (1 − floor) · (1 + cos πx) / 2.
    Cosine {
        /// What is left at the end, 0…1.
        floor: f64,
    },
    /// Warm-up, stable, decay: 1, and in the last `steps` steps a straight line down to `floor`.
    Late {
        /// How many steps decay.
        steps: u64,
        /// What is left at the end, 0…1.
        floor: f64,
    },
}

/// Why there is no such schedule.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// A floor that is no share.
    #[error("the schedule's floor must be between 0 and 1, not {0}")]
    Floor(f64),
}

impl Schedule {
    /// Refuses what is no course; one that came over a wire or from a store may be anything.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn check(&self) -> Result<(), ScheduleError> {
        let floor = match self.decay {
            Decay::Constant => 0.0,
            Decay::Linear { floor } | Decay::Cosine { floor } | Decay::Late { floor, .. } => floor,
        };
        if !(0.0..=1.0).contains(&floor) {
            return Err(ScheduleError::Floor(floor));
        }
        Ok(())
    }

    /// The factor of step `step` (from 0) of `steps`. Steps beyond the last have the factor that the decay ends with.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let straight = |floor: f64, x: f64| floor + (1.0 - floor) * (1.0 - x);
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear { floor } => straight(floor, progress(step, self.warmup_steps, steps)),
            Decay::Cosine { floor } => {
                let x = progress(step, self.warmup_steps, steps);
                floor + (1.0 - floor) * (0.5 * (1.0 + cos_pi(x)))
            }
            Decay::Late { steps: late, floor } => {
                let begin = steps.saturating_sub(late).max(self.warmup_steps);
                if step < begin { 1.0 } else { straight(floor, progress(step, begin, steps)) }
            }
        }
    }
}

/// How far `step` is from `begin` to `end`, 0…1.
fn progress(step: u64, begin: u64, end: u64) -> f64 {
    if step >= end {
        return 1.0;
    }
    (step - begin) as f64 / (end - begin) as f64
}

/// cos πx for x in 0…1, within 2⁻⁵² of it; exactly symmetric about ½.
fn cos_pi(x: f64) -> f64 {
    if x > 0.5 {
        return -cos_pi(1.0 - x);
    }
    // Below ¼ the cosine's series, above it the sine's from the other end: arguments stay below π/4.
    let (y, is_sine) = if x > 0.25 { (0.5 - x, true) } else { (x, false) };
    let y = y * std::f64::consts::PI;
    let z = y * y;
    // Taylor's series, the first term left out; the next one would be below 2⁻⁵⁸.
    let horner = |coefficients: [f64; 8]| coefficients.into_iter().fold(0.0, |sum, c| sum * z + c);
    if is_sine {
        let tail = horner([
            0.0,
            -1.0 / 1_307_674_368_000.0,
            1.0 / 6_227_020_800.0,
            -1.0 / 39_916_800.0,
            1.0 / 362_880.0,
            -1.0 / 5_040.0,
            1.0 / 120.0,
            -1.0 / 6.0,
        ]);
        y + y * (z * tail)
    } else {
        let tail = horner([
            1.0 / 20_922_789_888_000.0,
            -1.0 / 87_178_291_200.0,
            1.0 / 479_001_600.0,
            -1.0 / 3_628_800.0,
            1.0 / 40_320.0,
            -1.0 / 720.0,
            1.0 / 24.0,
            -1.0 / 2.0,
        ]);
        1.0 + z * tail
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn factors(warmup: u64, decay: Decay, steps: u64) -> Vec<f64> {
        let schedule = Schedule { warmup_steps: warmup, decay };
        schedule.check().unwrap();
        (0..steps).map(|step| schedule.factor(step, steps)).collect()
    }

    #[test]
    fn each_course_is_as_described() {
        assert_eq!(factors(2, Decay::Constant, 4), [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(factors(0, Decay::Linear { floor: 0.0 }, 4), [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(factors(1, Decay::Linear { floor: 0.5 }, 5), [1.0, 1.0, 0.875, 0.75, 0.625]);
        assert_eq!(factors(1, Decay::Late { steps: 2, floor: 0.0 }, 6), [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]);
        // A decay longer than what follows warm-up begins right after it.
        assert_eq!(factors(2, Decay::Late { steps: 9, floor: 0.0 }, 4), [0.5, 1.0, 1.0, 0.5]);
        let cosine = factors(0, Decay::Cosine { floor: 0.0 }, 4);
        assert_eq!((cosine[0], cosine[2]), (1.0, 0.5));
        assert!((cosine[1] - 0.853_553_390_593_273_8).abs() < 1e-15);
        assert!((cosine[3] - 0.146_446_609_406_726_2).abs() < 1e-15);
    }

    #[test]
    fn factors_stay_between_floor_and_one_and_never_rise_after_warmup() {
        for decay in [
            Decay::Constant,
            Decay::Linear { floor: 0.1 },
            Decay::Cosine { floor: 0.1 },
            Decay::Late { steps: 30, floor: 0.1 },
        ] {
            for (warmup, steps) in [(0, 1), (0, 100), (7, 100), (100, 100), (200, 100), (u64::MAX, 100)] {
                let factors = factors(warmup, decay, steps);
                assert!(factors.iter().all(|f| (0.0..=1.0).contains(f)), "{decay:?}");
                let after = factors.iter().skip(warmup.min(steps) as usize);
                assert!(after.clone().all(|&f| f >= 0.1) && after.is_sorted_by(|a, b| a >= b), "{decay:?}");
            }
            let schedule = Schedule { warmup_steps: 3, decay };
            let end = if decay == Decay::Constant { 1.0 } else { 0.1 };
            assert!((schedule.factor(500, 100) - end).abs() < 1e-15);
        }
    }

    #[test]
    fn the_cosine_is_accurate_and_its_bits_are_fixed() {
        let mut worst = 0.0_f64;
        let mut hash = blake3::Hasher::new();
        for step in 0..=100_000 {
            let x = f64::from(step) / 100_000.0;
            let own = cos_pi(x);
            worst = worst.max((own - (x * std::f64::consts::PI).cos()).abs());
            hash.update(&own.to_bits().to_le_bytes());
        }
        assert!(worst < 4e-16, "{worst}");
        assert_eq!(
            hash.finalize().to_hex().as_str(),
            "cf302ff6d1f68d13b30adf5ecf55976d0001fc68b437dd7fa1e282e3e58de47e"
        );
    }

    #[test]
    fn a_floor_that_is_no_share_is_refused() {
        for floor in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            let schedule = Schedule { warmup_steps: 0, decay: Decay::Cosine { floor } };
            assert!(schedule.check().is_err(), "{floor}");
        }
    }
}
