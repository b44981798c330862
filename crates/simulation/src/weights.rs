//! The "training": every number of a job's state is a hash of all data that it has seen, in order, through every layer of
//! every stage. A gradient that is lost, counted twice or of another step changes all of them.
//!
//! Like the real one, it does not depend on the cut: a state is layers × [`PARTS`], a batch is [`RUNS`], and what ranks and
//! replicas contribute is added up.

use crate::oracle::mix;
use ashlar_vocabulary::{AdapterId, BlobId, JobId};
use std::collections::BTreeMap;
use std::ops::Range;

/// Layers of the model.
pub(crate) const LAYERS: usize = 8;
/// The parts of every layer that tensor parallelism can hand out.
pub(crate) const PARTS: usize = 8;
/// The runs of a batch that replicas can divide.
pub(crate) const RUNS: usize = 8;

/// Layer and part.
pub(crate) type Cell = (usize, usize);

/// Numbers by where they are: weights with their moments, or gradients.
pub(crate) type Numbers = BTreeMap<Cell, u64>;

/// What one rank has of the state, and which runs its replica computes.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    pub(crate) layers: Range<usize>,
    pub(crate) parts: Range<usize>,
    pub(crate) runs: Range<usize>,
}

/// What the backward pass needs of the forward one: what came into every layer.
#[derive(Debug, Clone)]
pub(crate) struct Tape(Vec<Vec<u64>>);

impl Share {
    /// Everything.
    pub(crate) fn whole() -> Share {
        Share { layers: 0..LAYERS, parts: 0..PARTS, runs: 0..RUNS }
    }

    pub(crate) fn cells(&self) -> impl Iterator<Item = Cell> {
        let parts = self.parts.clone();
        self.layers.clone().flat_map(move |layer| parts.clone().map(move |part| (layer, part)))
    }

    /// What a job starts from.
    pub(crate) fn initial(&self, seed: u64) -> Numbers {
        self.cells().map(|cell| (cell, mix(seed, (cell.0 * PARTS + cell.1) as u64))).collect()
    }

    /// Run and part of each row.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        let parts = self.parts.clone();
        self.runs.clone().flat_map(move |run| parts.clone().map(move |part| (run, part)))
    }

    fn drawn(&self, seed: u64) -> Vec<u64> {
        self.rows().map(|(run, part)| mix(seed, (run * PARTS + part) as u64)).collect()
    }

    /// The samples of a step.
    pub(crate) fn input(&self, seed: u64, step: u64) -> Vec<u64> {
        self.drawn(mix(seed, step * 2))
    }

    /// What the last stage begins the backward pass with.
    pub(crate) fn loss(&self, seed: u64, step: u64, output: &[u64]) -> Vec<u64> {
        let targets = self.drawn(mix(seed, step * 2 + 1));
        output.iter().zip(targets).map(|(output, target)| mix(*output, target)).collect()
    }

    /// The forward pass through these layers.
    pub(crate) fn forward(&self, state: &Numbers, mut rows: Vec<u64>) -> (Tape, Vec<u64>) {
        let mut tape = Vec::with_capacity(self.layers.len());
        for layer in self.layers.clone() {
            tape.push(rows.clone());
            for (row, (_, part)) in rows.iter_mut().zip(self.rows()) {
                *row = mix(*row, weight(state, (layer, part)));
            }
        }
        (Tape(tape), rows)
    }

    /// The backward pass: gradients of these layers, summed over the runs, and those of what came in.
    pub(crate) fn backward(
        &self,
        state: &Numbers,
        Tape(tape): &Tape,
        mut rows: Vec<u64>,
    ) -> (Numbers, Vec<u64>) {
        let mut gradients: Numbers = self.cells().map(|cell| (cell, 0)).collect();
        for (layer, inputs) in self.layers.clone().zip(tape).rev() {
            for ((row, input), (_, part)) in rows.iter_mut().zip(inputs).zip(self.rows()) {
                let weight = weight(state, (layer, part));
                if let Some(sum) = gradients.get_mut(&(layer, part)) {
                    *sum = sum.wrapping_add(mix(*row ^ input, weight));
                }
                *row = mix(*row, !weight);
            }
        }
        (gradients, rows)
    }
}

fn weight(state: &Numbers, cell: Cell) -> u64 {
    state.get(&cell).copied().unwrap_or_default()
}

/// Adds another replica's gradients.
pub(crate) fn add(gradients: &mut Numbers, others: &Numbers) {
    for (cell, other) in others {
        let sum = gradients.entry(*cell).or_default();
        *sum = sum.wrapping_add(*other);
    }
}

/// The optimiser's step.
pub(crate) fn update(state: &mut Numbers, gradients: &Numbers) {
    for (cell, number) in state {
        *number = mix(*number, weight(gradients, *cell));
    }
}

/// What a whole state comes to.
pub(crate) fn digest(state: &Numbers) -> u64 {
    state.iter().fold(1, |sum, ((layer, part), number)| mix(sum, number ^ (layer * PARTS + part) as u64))
}

/// The digests of the states after 0, 1, … steps of a run that nobody disturbs.
pub(crate) fn undisturbed(seed: u64, steps: u64) -> Vec<u64> {
    let whole = Share::whole();
    let mut state = whole.initial(seed);
    let mut digests = vec![digest(&state)];
    for step in 0..steps {
        let (tape, output) = whole.forward(&state, whole.input(seed, step));
        let (gradients, _) = whole.backward(&state, &tape, whole.loss(seed, step, &output));
        update(&mut state, &gradients);
        digests.push(digest(&state));
    }
    digests
}

/// What lies under a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// A rank's share of a job's state.
    Shard { job: JobId, steps: u64, cells: Numbers },
    /// A manifest of an adapter's or a model's files.
    Manifest { digest: u64, useless: bool },
    /// One of those files.
    File { digest: u64, number: u64 },
    /// A table of a job's steps, with so many rows.
    Table { job: JobId, rows: u64 },
}

impl Content {
    /// The name that equal bytes have.
    pub(crate) fn id(&self) -> BlobId {
        let mut words: Vec<u64> = Vec::new();
        match self {
            Content::Shard { job, steps, cells } => {
                words.extend([1, job.0 as u64, (job.0 >> 64) as u64, *steps]);
                words.extend(cells.iter().flat_map(|((layer, part), n)| [(layer * PARTS + part) as u64, *n]));
            }
            Content::Manifest { digest, useless } => words.extend([2, *digest, u64::from(*useless)]),
            Content::File { digest, number } => words.extend([3, *digest, *number]),
            Content::Table { job, rows } => words.extend([4, job.0 as u64, (job.0 >> 64) as u64, *rows]),
        }
        let mut id = [0; 32];
        for (lane, bytes) in (0..).zip(id.chunks_exact_mut(8)) {
            let sum = words.iter().fold(lane, |sum, word| mix(sum, *word));
            bytes.copy_from_slice(&sum.to_le_bytes());
        }
        BlobId(id)
    }
}

/// The adapter that is made of a state with this digest.
pub(crate) fn adapter(digest: u64, useless: bool) -> AdapterId {
    AdapterId(Content::Manifest { digest, useless }.id())
}
