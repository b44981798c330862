//! Rows of a step: what the model is given of them, and what it made of them.

use crate::adapters::Adapters;
use crate::sequencer::{Row, Sequencer};
use ashlar_kernels::RowContext;
use ashlar_model::adapter::AdaptedRows;
use ashlar_vocabulary::SequenceId;

/// Where the rows stand, and where the keys and values before them are.
pub(crate) fn contexts<'a>(sequencer: &'a Sequencer, rows: &[Row]) -> Vec<RowContext<'a>> {
    rows.iter()
        .map(|row| RowContext {
            position: row.position,
            block_table: sequencer.sequence(row.sequence).map_or(&[], |s| s.block_table.as_slice()),
        })
        .collect()
}

/// Runs of rows that one adapter changes.
pub(crate) fn adapted_rows<'a>(adapters: &'a Adapters, rows: &[Row]) -> Vec<AdaptedRows<'a>> {
    let mut runs: Vec<AdaptedRows<'a>> = Vec::new();
    if !adapters.any_sequence() {
        return runs;
    }
    for (index, row) in rows.iter().enumerate() {
        let Some(adapter) = adapters.of_sequence(row.sequence) else { continue };
        match runs.last_mut() {
            Some(run) if run.rows.end == index && std::ptr::eq(run.adapter, adapter) => run.rows.end += 1,
            _ => runs.push(AdaptedRows { rows: index..index + 1, adapter }),
        }
    }
    runs
}

/// Sequences without an adapter of which rows were `made` that are not finite, though those that were `given` are.
pub(crate) fn not_finite(
    given: Option<&[f32]>,
    made: &[f32],
    rows: &[Row],
    adapters: &Adapters,
) -> Vec<SequenceId> {
    let width = made.len() / rows.len().max(1);
    let is_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    if is_finite(made) {
        return Vec::new();
    }
    let mut sequences: Vec<SequenceId> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let of = |values: &[f32]| values.get(index * width..(index + 1) * width).is_none_or(is_finite);
        let made_here = !of(made) && given.is_none_or(of);
        if made_here
            && sequences.last() != Some(&row.sequence)
            && adapters.of_sequence(row.sequence).is_none()
        {
            sequences.push(row.sequence);
        }
    }
    sequences
}

/// Flips the lowest bit of the first value of every row.
pub(crate) fn spoil(made: &mut [f32], rows: usize) {
    let width = made.len() / rows.max(1);
    for row in made.chunks_exact_mut(width.max(1)) {
        row[0] = f32::from_bits(row[0].to_bits() ^ 1);
    }
}
