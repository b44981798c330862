//! Digests of what a rank computes of audited sequences: equal bits, equal digests.

use crate::sequencer::Row;
use ashlar_protocol::step::{Boundary, NewSequence, RowDigests};
use ashlar_vocabulary::SequenceId;
use std::collections::BTreeMap;

/// The audited sequences on a rank, and what has been seen of them in the step at hand.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    /// From which position on the logits of a sequence are looked at.
    logits_from: BTreeMap<SequenceId, u32>,
    seen: Vec<RowDigests>,
}

impl Digests {
    pub(crate) fn begin(&mut self, new: &NewSequence) {
        if let Some(from) = new.audit_logits_from {
            self.logits_from.insert(new.id, from);
        }
    }

    pub(crate) fn end(&mut self, id: SequenceId) {
        self.logits_from.remove(&id);
    }

    /// Whether no sequence is audited: then nothing is to be done.
    pub(crate) fn is_idle(&self) -> bool {
        self.logits_from.is_empty()
    }

    /// Whether logits of a row are looked at, wanted or not.
    pub(crate) fn wants_logits(&self, row: Row) -> bool {
        self.logits_from.get(&row.sequence).is_some_and(|from| row.position >= *from)
    }

    /// Takes what the layers made of the step's rows.
    pub(crate) fn see_rows(&mut self, layers: u32, rows: &[Row], made: &[f32]) {
        if self.is_idle() || rows.is_empty() {
            return;
        }
        let width = made.len() / rows.len();
        for (row, values) in rows.iter().zip(made.chunks_exact(width.max(1))) {
            if self.logits_from.contains_key(&row.sequence) {
                self.see(Boundary::Layers(layers), *row, values);
            }
        }
    }

    /// Takes a row's logits, as the head made them.
    pub(crate) fn see_logits(&mut self, row: Row, logits: &[f32]) {
        if self.wants_logits(row) {
            self.see(Boundary::Logits, row, logits);
        }
    }

    fn see(&mut self, boundary: Boundary, row: Row, values: &[f32]) {
        let digest = digest(values);
        let follows = |run: &&mut RowDigests| {
            let next = run.start + run.digests.len() as u32;
            run.id == row.sequence && run.boundary == boundary && next == row.position
        };
        match self.seen.last_mut().filter(follows) {
            Some(run) => run.digests.push(digest),
            None => {
                let (id, start) = (row.sequence, row.position);
                self.seen.push(RowDigests { id, boundary, start, digests: vec![digest] });
            }
        }
    }

    /// What has been seen since the last call.
    pub(crate) fn take(&mut self) -> Vec<RowDigests> {
        std::mem::take(&mut self.seen)
    }
}

/// A digest of values' bits; it finds faults, not forgeries. Four lanes, so that it takes far less time than computing them: each is
/// FNV-1a over words instead of bytes, with a rotation that carries high bits down.
fn digest(values: &[f32]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut lanes = [0xcbf2_9ce4_8422_2325_u64, 1, 2, 3];
    let step =
        |lane: u64, value: f32| (lane ^ u64::from(value.to_bits())).wrapping_mul(PRIME).rotate_left(29);
    let mut quads = values.chunks_exact(4);
    for quad in &mut quads {
        for (lane, value) in lanes.iter_mut().zip(quad) {
            *lane = step(*lane, *value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(quads.remainder()) {
        *lane = step(*lane, *value);
    }
    let length = values.len() as u64;
    lanes.into_iter().fold(length, |all, lane| (all ^ lane).wrapping_mul(PRIME).rotate_left(29))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sequence: u64, position: u32) -> Row {
        Row { sequence: SequenceId(sequence), position, token: 0 }
    }

    #[test]
    fn every_bit_of_every_value_counts_and_so_do_order_and_length() {
        let values: Vec<f32> = (0..37).map(|index| index as f32 / 7.0 - 2.0).collect();
        let plain = digest(&values);
        assert_eq!(plain, digest(&values.clone()));
        for index in 0..values.len() {
            for bit in 0..32 {
                let mut other = values.clone();
                other[index] = f32::from_bits(other[index].to_bits() ^ 1 << bit);
                assert_ne!(plain, digest(&other), "bit {bit} of value {index}");
            }
        }
        let mut swapped = values.clone();
        swapped.swap(0, 4);
        assert_ne!(plain, digest(&swapped));
        assert_ne!(digest(&[0.0]), digest(&[0.0, 0.0]));
        assert_ne!(digest(&[0.0]), digest(&[-0.0]));
    }

    #[test]
    fn rows_of_audited_sequences_are_seen_in_runs_and_no_others() {
        let mut digests = Digests::default();
        digests.logits_from.insert(SequenceId(7), 2);
        let rows = [row(6, 0), row(7, 1), row(7, 2), row(8, 5)];
        let made: Vec<f32> = (0..8).map(|value| value as f32).collect();
        digests.see_rows(4, &rows, &made);
        for row in rows {
            digests.see_logits(row, &[1.0]);
        }
        let seen = digests.take();
        let expected = [(Boundary::Layers(4), 1, 2), (Boundary::Logits, 2, 1)];
        let places = seen.iter().map(|run| (run.boundary, run.start, run.digests.len()));
        assert!(places.eq(expected), "{seen:?}");
        assert_eq!(seen[0].digests, [digest(&made[2..4]), digest(&made[4..6])]);
        digests.end(SequenceId(7));
        digests.see_rows(4, &rows, &made);
        assert_eq!(digests.take(), []);
    }
}
