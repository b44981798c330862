//! What a rank has handed on to the next stage: a row per position, beside the blocks of the KV cache and as many.
//!
//! Should the next stage be lost, it is sent these rows again and computes what it had; the stages before it compute nothing. Rows
//! lie here in the type in which they travel, and so without loss.

use crate::sequencer::{BLOCK_TOKENS, Row, Sequencer};
use ashlar_kernels::Kernels;
use ashlar_vocabulary::{Bytes, FloatType};

/// The rows of all blocks.
#[derive(Debug)]
pub(crate) struct BoundaryLog {
    kind: FloatType,
    /// Values of a row.
    width: usize,
    bytes: Vec<u8>,
    /// Whether it has the rows of every block that has a name: not one that began beside a cache with content.
    complete: bool,
    /// Rows of a step, one after the other.
    staged: Vec<u8>,
}

impl BoundaryLog {
    /// Reserves rows of `width` values for so many blocks, to be kept or read at most `rows_max` at a time; pages become resident when
    /// first used.
    pub(crate) fn new(
        (kind, width): (FloatType, usize),
        blocks: usize,
        rows_max: usize,
        complete: bool,
    ) -> BoundaryLog {
        let row_bytes = width * kind.bytes();
        let bytes = vec![0; blocks * BLOCK_TOKENS * row_bytes];
        BoundaryLog { kind, width, bytes, complete, staged: Vec::with_capacity(rows_max * row_bytes) }
    }

    /// Whether it has the rows of every block that has a name.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Reserved memory.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes((self.bytes.len() + self.staged.capacity()) as u64)
    }

    /// Keeps what was made of `rows`.
    pub(crate) fn keep(&mut self, kernels: &Kernels, sequencer: &Sequencer, rows: &[Row], made: &[f32]) {
        let row_bytes = self.width * self.kind.bytes();
        let mut staged = std::mem::take(&mut self.staged);
        staged.resize(rows.len() * row_bytes, 0);
        kernels.narrow(self.kind, made, &mut staged);
        for (row, values) in rows.iter().zip(staged.chunks_exact(row_bytes)) {
            if let Some(kept) = place(sequencer, *row, row_bytes).and_then(|place| self.bytes.get_mut(place))
            {
                kept.copy_from_slice(values);
            }
        }
        self.staged = staged;
    }

    /// Appends to `values` what was kept of `rows`.
    pub(crate) fn read(
        &mut self,
        kernels: &Kernels,
        sequencer: &Sequencer,
        rows: &[Row],
        values: &mut Vec<f32>,
    ) {
        let row_bytes = self.width * self.kind.bytes();
        self.staged.resize(rows.len() * row_bytes, 0);
        for (row, staged) in rows.iter().zip(self.staged.chunks_exact_mut(row_bytes)) {
            if let Some(kept) = place(sequencer, *row, row_bytes).and_then(|place| self.bytes.get(place)) {
                staged.copy_from_slice(kept);
            }
        }
        let before = values.len();
        values.resize(before + rows.len() * self.width, 0.0);
        kernels.widen(self.kind, &self.staged, &mut values[before..]);
    }
}

/// Where a row lies: beside the keys and values of its position.
fn place(sequencer: &Sequencer, row: Row, row_bytes: usize) -> Option<std::ops::Range<usize>> {
    let position = row.position as usize;
    let block = sequencer.sequence(row.sequence)?.block_table.get(position / BLOCK_TOKENS)?;
    let start = (block.0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS) * row_bytes;
    Some(start..start + row_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sequencer::Event;
    use ashlar_kernels::Isa;
    use ashlar_protocol::prefix::BlockHash;
    use ashlar_protocol::step::{NewSequence, SequenceSlice, StepPlan};
    use ashlar_vocabulary::{BlockId, LeaseTerm, ReplicaRevision, SamplingParams, SequenceId, StepId};

    const WIDTH: usize = 24;

    /// Two sequences of twenty tokens, whose blocks lie across each other.
    fn sequencer() -> Sequencer {
        let mut sequencer = Sequencer::default();
        let (term, revision) = (LeaseTerm(1), ReplicaRevision(1));
        let assigned = Event::Assigned { term, revision, kv_blocks: 4, max_rows: 64, cache_kept: false };
        sequencer.handle(assigned, &mut Vec::new());
        let tables = [(1, [3, 0]), (2, [1, 2])];
        let sequence = |id| NewSequence {
            id: SequenceId(id),
            prompt: (0..20).collect(),
            generated: Vec::new(),
            adapter: None,
            root: BlockHash::default(),
            sampling: SamplingParams::default(),
            traceparent: None,
            audit_logits_from: None,
        };
        let slice = |(id, table): (u64, [u32; 2])| SequenceSlice {
            id: SequenceId(id),
            append: Vec::new(),
            reset_blocks: false,
            new_blocks: table.map(BlockId).to_vec(),
            start: 0,
            count: 20,
            sample: false,
        };
        let plan = StepPlan {
            term,
            revision,
            step: StepId(1),
            new_sequences: tables.map(|(id, _)| sequence(id)).to_vec(),
            slices: tables.map(slice).to_vec(),
            ended_sequences: Vec::new(),
            refill: None,
        };
        sequencer.handle(Event::Plan(plan), &mut Vec::new());
        sequencer
    }

    fn rows(id: u64, positions: std::ops::Range<u32>) -> Vec<Row> {
        positions.map(|position| Row { sequence: SequenceId(id), position, token: position }).collect()
    }

    #[test]
    fn what_was_handed_on_is_read_again_bit_for_bit_whatever_came_later() {
        let (kernels, sequencer) = (Kernels::new(Isa::best(), 2), sequencer());
        for kind in FloatType::ALL {
            let mut log = BoundaryLog::new((kind, WIDTH), 4, 64, true);
            let reserved = log.bytes();
            let mut made: Vec<f32> = (0..40 * WIDTH).map(|at| (at as f32 * 0.37).sin() * 100.0).collect();
            kernels.round_to(kind, &mut made);
            let (first, second) = made.split_at(20 * WIDTH);
            log.keep(&kernels, &sequencer, &[rows(1, 0..20), rows(2, 0..13)].concat(), &made[..33 * WIDTH]);
            // The rest of it in steps of its own.
            for position in 13..20 {
                let at = position as usize * WIDTH;
                log.keep(&kernels, &sequencer, &rows(2, position..position + 1), &second[at..at + WIDTH]);
            }
            let mut read = vec![f32::NAN; 3];
            log.read(&kernels, &sequencer, &rows(2, 5..20), &mut read);
            assert!(read.drain(..3).all(f32::is_nan), "what was there stays");
            assert!(read.iter().zip(&second[5 * WIDTH..]).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind}");
            assert_eq!(read.len(), 15 * WIDTH);
            read.clear();
            log.read(&kernels, &sequencer, &[rows(2, 0..1), rows(1, 16..20)].concat(), &mut read);
            let expected = [&second[..WIDTH], &first[16 * WIDTH..]].concat();
            assert!(read.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind}");
            assert_eq!((read.len(), log.bytes()), (5 * WIDTH, reserved));
        }
    }
}
