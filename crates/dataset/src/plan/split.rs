//! Samples set aside for validation.

use super::order::shuffle;
use crate::file::SampleSize;
use ashlar_vocabulary::random::Purpose;

/// Which samples are trained and which only measured. Both ascend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Trained.
    pub training: Vec<u32>,
    /// Measured.
    pub validation: Vec<u32>,
}

/// Sets aside the samples of `validation_examples` examples, chosen by the seed. Samples of one example stay together: they share
/// text. Where there are not more examples than that, one is left to train on.
pub fn split(sizes: &[SampleSize], validation_examples: u32, seed: u64) -> Split {
    let mut examples: Vec<u32> = sizes.iter().map(|size| size.example).collect();
    examples.dedup();
    shuffle(&mut examples, seed, Purpose::Split, 0);
    examples.truncate((validation_examples as usize).min(examples.len().saturating_sub(1)));
    examples.sort_unstable();
    let (validation, training) = (0_u32..)
        .zip(sizes)
        .map(|(sample, size)| (sample, examples.binary_search(&size.example).is_ok()))
        .fold((Vec::new(), Vec::new()), |(mut aside, mut rest), (sample, is_aside)| {
            if is_aside {
                aside.push(sample)
            } else {
                rest.push(sample)
            }
            (aside, rest)
        });
    Split { training, validation }
}
