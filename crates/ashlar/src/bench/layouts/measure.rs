//! What is measured, in which order.

use super::LayoutArgs;
use super::layout::{Kind, Running, Timed};
use super::rank::Spent;
use crate::bench::machine::Machine;
use crate::bench::rows::{Sequences, Work};
use crate::bench::{MEASURING, progress_bar};
use anyhow::{Result, bail};
use ashlar_kernels::Kernels;
use ashlar_vocabulary::{ModelShape, Precision};
use serde::Serialize;

/// A load that every layout can be put under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case", tag = "load")]
pub(crate) enum Load {
    /// Prompts one after the other, as many in flight as there are micro-batches.
    Prompts {
        /// Tokens of each.
        tokens: usize,
        /// How many in flight.
        micro_batches: usize,
    },
    /// One prompt with nothing before or after it, cut into chunks.
    LonePrompt {
        /// Its tokens.
        tokens: usize,
        /// Tokens of a chunk.
        chunk: usize,
    },
    /// Decode steps.
    Decode {
        /// Sequences of one micro-batch.
        rows: usize,
        /// How many are in flight.
        micro_batches: usize,
    },
}

impl Load {
    /// Tokens of one round: of one step of every micro-batch.
    pub(crate) fn tokens(&self) -> usize {
        match *self {
            Load::Prompts { tokens, micro_batches } => tokens * micro_batches,
            Load::LonePrompt { tokens, .. } => tokens,
            Load::Decode { rows, micro_batches } => rows * micro_batches,
        }
    }

    /// Micro-batches in flight.
    pub(crate) fn micro_batches(&self) -> usize {
        match *self {
            Load::Prompts { micro_batches, .. } | Load::Decode { micro_batches, .. } => micro_batches,
            Load::LonePrompt { .. } => 1,
        }
    }
}

/// One layout under one load in one repeat; times are per round.
#[derive(Debug, Clone)]
pub(super) struct Measurement {
    pub(super) kind: Kind,
    pub(super) load: Load,
    pub(super) repeat: usize,
    /// Seconds of a round.
    pub(super) seconds: f64,
    /// A round's times, rank by rank.
    pub(super) ranks: Vec<Spent>,
}

/// Everything that follows from the arguments.
#[derive(Debug)]
pub(super) struct Plan {
    batches: Vec<usize>,
    decode: usize,
    context: usize,
    prefill: usize,
    chunk: usize,
    repeat: usize,
    sequences: Sequences,
    /// Index of the first of the two prompts' sequences.
    first_prompt: usize,
    precision: Precision,
}

/// Prompts that are counted per measurement and micro-batch.
const PROMPTS: usize = 1;

impl Plan {
    /// Checks the arguments against the model and lays the sequences out.
    pub(super) fn new(args: &LayoutArgs, shape: &ModelShape) -> Result<Plan> {
        if args.context.max(args.prefill) > shape.max_position_embeddings {
            bail!(
                "the model ends at {} tokens: shorten --context or --prefill",
                shape.max_position_embeddings
            );
        }
        let mut batches = args.batches.clone();
        batches.sort_unstable();
        batches.dedup();
        if batches.is_empty() && args.prefill == 0 {
            bail!("nothing to measure: give --batches or --prefill");
        }
        let first_prompt = 2 * batches.last().copied().unwrap_or(0);
        let decoding = std::iter::repeat_n(args.context, first_prompt);
        Ok(Plan {
            sequences: Sequences::new(decoding.chain([args.prefill; 2])),
            batches,
            decode: args.decode,
            context: args.context,
            prefill: args.prefill,
            chunk: args.chunk,
            repeat: args.repeat,
            first_prompt,
            precision: args.precision.precision(),
        })
    }

    /// In which precision the model is held.
    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// Every sequence of the run.
    pub(super) fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// Blocks that each rank reserves.
    pub(super) fn cache_blocks(&self) -> usize {
        self.sequences.blocks()
    }

    /// Rows of the largest step.
    pub(super) fn rows_max(&self) -> usize {
        self.batches.last().copied().unwrap_or(0).max(self.prefill)
    }

    /// The loads of a layout. One rank also decodes the stages' micro-batches, to compare with.
    pub(super) fn loads(&self, kind: Kind, stages_too: bool) -> Vec<Load> {
        let micro_batches = if matches!(kind, Kind::Stages { .. }) { 2 } else { 1 };
        let mut loads: Vec<Load> = match kind {
            Kind::Stages { .. } => halves_and_wholes(&self.batches),
            Kind::One if stages_too => halves_and_wholes(&self.batches),
            _ => self.batches.clone(),
        }
        .into_iter()
        .map(|rows| Load::Decode { rows, micro_batches })
        .collect();
        loads.sort_unstable();
        loads.dedup();
        if self.prefill > 0 {
            loads.push(Load::Prompts { tokens: self.prefill, micro_batches });
            if micro_batches > 1 && self.chunk < self.prefill {
                loads.push(Load::LonePrompt { tokens: self.prefill, chunk: self.chunk });
            }
        }
        loads
    }

    /// Puts `layout` under `load` once.
    fn measure(&self, layout: &Running, load: Load, repeat: usize) -> Result<Measurement> {
        let (timed, rounds) = match load {
            Load::Decode { rows, micro_batches } => {
                let counted = self.decode * micro_batches;
                let timed = layout.steady(micro_batches, counted, |step| Work::Decode {
                    first: step % micro_batches * rows,
                    rows,
                    position: self.context - 1,
                })?;
                (timed, self.decode)
            }
            Load::Prompts { tokens, micro_batches } => {
                let timed = layout.steady(micro_batches, PROMPTS * micro_batches, |step| Work::Prefill {
                    sequence: self.first_prompt + step % micro_batches,
                    start: 0,
                    rows: tokens,
                    logits: true,
                })?;
                (timed, PROMPTS)
            }
            Load::LonePrompt { tokens, chunk } => {
                let chunks = tokens.div_ceil(chunk);
                let timed = layout.alone(layout.ranks(), chunks, |step| Work::Prefill {
                    sequence: self.first_prompt,
                    start: step * chunk,
                    rows: chunk.min(tokens - step * chunk),
                    logits: step + 1 == chunks,
                })?;
                (timed, 1)
            }
        };
        let Timed { seconds, ranks } = timed;
        let per_round = 1.0 / rounds as f64;
        Ok(Measurement {
            kind: layout.kind(),
            load,
            repeat,
            seconds: seconds * per_round,
            ranks: ranks.into_iter().map(|spent| spent.scaled(per_round)).collect(),
        })
    }
}

fn halves_and_wholes(batches: &[usize]) -> Vec<usize> {
    batches.iter().flat_map(|&batch| [batch / 2, batch]).filter(|&rows| rows > 0).collect()
}

/// Puts all layouts under all their loads, `repeat` times; loads of one size are neighbours in time.
pub(super) fn run(
    plan: &Plan,
    one: &Running,
    others: &[Running],
    machine: &mut Machine,
    kernels: &Kernels,
) -> Result<Vec<Measurement>> {
    let stages_too = others.iter().any(|layout| matches!(layout.kind(), Kind::Stages { .. }));
    let layouts: Vec<&Running> = std::iter::once(one).chain(others).collect();
    let mut series: Vec<(&Running, Load)> = Vec::new();
    for &layout in &layouts {
        series.extend(plan.loads(layout.kind(), stages_too).into_iter().map(|load| (layout, load)));
    }
    // A stable sort: loads by size, and layouts in order within a size.
    series.sort_by_key(|(_, load)| match *load {
        Load::Decode { rows, .. } => (0, rows),
        _ => (1, 0),
    });
    let bar = progress_bar((plan.repeat * series.len()) as u64, MEASURING);
    let mut measurements = Vec::new();
    for repeat in 0..plan.repeat {
        machine.read(kernels);
        for index in 0..series.len() {
            let turn = if repeat % 2 == 0 { index } else { series.len() - 1 - index };
            let (layout, load) = series[turn];
            bar.set_message(format!("{}, {load:?}", layout.kind().name()));
            measurements.push(plan.measure(layout, load, repeat)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(measurements)
}
