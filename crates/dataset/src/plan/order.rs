//! Shuffling: Fisher and Yates, with numbers of the counter-based generator.

use ashlar_vocabulary::random::{Purpose, random_below};

/// The order of an epoch.
pub(super) fn shuffled(samples: &[u32], seed: u64, epoch: u32) -> Vec<u32> {
    let mut order = samples.to_vec();
    shuffle(&mut order, seed, Purpose::Order, epoch);
    order
}

/// Every order is equally likely over the seeds, to within one in 2³².
pub(super) fn shuffle(items: &mut [u32], seed: u64, purpose: Purpose, stream: u32) {
    for last in (1..items.len()).rev() {
        let index = last as u32;
        let chosen = random_below(u64::from(index) + 1, seed, purpose, [index, stream]);
        items.swap(last, chosen as usize);
    }
}
