//! What `"auto"` means, after OpenAI's documentation and cookbook.

/// Epochs that are aimed at.
const EPOCHS: u64 = 3;
/// Small files are repeated until a job sees so many examples …
const EXAMPLES_SEEN_MIN: u64 = 100;
/// … but not more often than this.
const EPOCHS_MAX: u64 = 25;
/// Large files are repeated less, so that a job sees at most so many.
const EXAMPLES_SEEN_MAX: u64 = 25_000;
/// The batch size is this share of the samples, in thousandths, …
const BATCH_PER_MILLE: u64 = 2;
/// … and at most this.
const BATCH_MAX: u64 = 256;

/// `n_epochs: "auto"`: three; up to 25 where three show the model fewer than 100 examples, fewer than three (at least one) where they
/// show it more than 25,000.
pub fn auto_epochs(examples: u64) -> u32 {
    let examples = examples.max(1);
    let epochs = if examples.saturating_mul(EPOCHS) < EXAMPLES_SEEN_MIN {
        (EXAMPLES_SEEN_MIN / examples).min(EPOCHS_MAX)
    } else if examples.saturating_mul(EPOCHS) > EXAMPLES_SEEN_MAX {
        (EXAMPLES_SEEN_MAX / examples).max(1)
    } else {
        EPOCHS
    };
    epochs as u32
}

/// `batch_size: "auto"`: 0.2 % of the samples, rounded to the nearest, within 1 and 256. A batch of fewer than eight samples leaves
/// some of its eight runs empty, so that not every data-parallel replica has work: give a number where that matters.
pub fn auto_batch_size(samples: u64) -> u32 {
    (samples.saturating_mul(BATCH_PER_MILLE).saturating_add(500) / 1000).clamp(1, BATCH_MAX) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_follow_the_number_of_examples() {
        let cases = [
            (0, 25),
            (1, 25),
            (4, 25),
            (10, 10),
            (33, 3),
            (34, 3),
            (8333, 3),
            (8334, 2),
            (25_001, 1),
            (u64::MAX, 1),
        ];
        for (examples, epochs) in cases {
            assert_eq!(auto_epochs(examples), epochs, "{examples}");
        }
    }

    #[test]
    fn batches_grow_with_the_file() {
        let cases = [(0, 1), (10, 1), (749, 1), (750, 2), (5000, 10), (128_000, 256), (u64::MAX, 256)];
        for (samples, batch) in cases {
            assert_eq!(auto_batch_size(samples), batch, "{samples}");
        }
    }
}
