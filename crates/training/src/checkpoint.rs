//! A rank's share of a job's state as bytes, and the way back onto any other layout.
//!
//! A shard says what it is, so that whoever has all shards of a step can put any share together from them.
//!
//! ```text
//! magic "ASHSTATE", version u32, length of the header u32, the header (JSON), then all numbers (f32):
//! per tensor in the header's order: weights, first moment, second moment
//! ```
//!
//! Numbers are little-endian. There is no checksum: a shard is stored under its digest.

use crate::state::AdapterState;
use ashlar_kernels::Kernels;
use ashlar_model::RankSlice;
use ashlar_model::adapter::{AdapterWeights, LoraPair, LoraSpec, Target};
use ashlar_model::peft::PeftAdapter;
use ashlar_vocabulary::{JobId, ModelShape};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

const MAGIC: [u8; 8] = *b"ASHSTATE";
const VERSION: u32 = 1;
/// Magic, version, length of the header.
const FRAME_BYTES: usize = 16;
/// Longest header: a few hundred bytes per layer.
const HEADER_BYTES_MAX: usize = 16 << 20;
/// Weights and two moments.
const KINDS: usize = 3;

/// Why a state cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Bytes that are no shard of this version.
    #[error("a share of the training state is not of version {VERSION}: start the job anew")]
    Version,
    /// Bytes that are not what was written.
    #[error("a share of the training state is damaged ({0}): start the job anew")]
    Damaged(&'static str),
    /// A shard of something else.
    #[error("a share of the training state belongs to another {0}: name the shares of one step of this job")]
    Mismatch(&'static str),
    /// Not every number was found.
    #[error(
        "the shares of the training state do not cover layer {layer}, {target}: name all shares of the step"
    )]
    Missing {
        /// The layer, counted over the model.
        layer: usize,
        /// The module.
        target: &'static str,
    },
}

/// Which step of which job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The job.
    pub job: JobId,
    /// Steps of the job that are in the state, skipped ones included.
    pub steps: u64,
}

/// One of a pair's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Half {
    A,
    B,
}

/// A rectangle of a tensor of the whole adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TensorShare {
    layer: usize,
    module: String,
    half: Half,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl TensorShare {
    fn numbers(&self) -> usize {
        self.rows.len().saturating_mul(self.columns.len())
    }
}

/// What a shard says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    job: String,
    steps: u64,
    optimizer_steps: u32,
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    tensors: Vec<TensorShare>,
}

/// The shares of every tensor on a rank, in [`AdapterWeights::tensors`]' order.
fn shares(spec: &LoraSpec, shape: &ModelShape, slice: &RankSlice) -> Vec<TensorShare> {
    let mut shares = Vec::new();
    for layer in slice.layers.start..slice.layers.end {
        let mut targets = spec.targets.clone();
        targets.sort_unstable();
        for target in targets {
            let share = |half, rows, columns| TensorShare {
                layer,
                module: target.module().to_owned(),
                half,
                rows,
                columns,
            };
            shares.push(share(Half::A, 0..spec.rank, target.inputs(shape, slice)));
            shares.push(share(Half::B, target.outputs(shape, slice), 0..spec.rank));
        }
    }
    shares
}

/// A rank's share as bytes.
pub fn write(state: &AdapterState, at: Position, shape: &ModelShape, slice: &RankSlice) -> Vec<u8> {
    let spec = &state.weights().spec;
    let header = Header {
        job: at.job.to_string(),
        steps: at.steps,
        optimizer_steps: state.steps(),
        rank: spec.rank,
        alpha: spec.alpha,
        rank_stabilized: spec.rank_stabilized,
        tensors: shares(spec, shape, slice),
    };
    // A header is numbers and names, which always have a JSON form.
    let header = serde_json::to_vec(&header).unwrap_or_default();
    let numbers: usize = state.weights().tensors().map(<[f32]>::len).sum();
    let mut bytes = Vec::with_capacity(FRAME_BYTES + header.len() + 4 * KINDS * numbers);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&header);
    let (first, second) = state.moments();
    let moments = first.tensors().zip(second.tensors());
    for (weights, (first, second)) in state.weights().tensors().zip(moments) {
        for tensor in [weights, first, second] {
            tensor.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
        }
    }
    bytes
}

/// A shard that has been read and found whole.
#[derive(Debug)]
pub struct Shard<'b> {
    header: Header,
    /// All numbers.
    body: &'b [u8],
}

impl<'b> Shard<'b> {
    /// Takes a shard's bytes apart.
    ///
    /// # Errors
    /// [`CheckpointError::Version`] and [`CheckpointError::Damaged`].
    pub fn parse(bytes: &'b [u8]) -> Result<Shard<'b>, CheckpointError> {
        let damaged = CheckpointError::Damaged;
        let (frame, rest) = bytes.split_at_checked(FRAME_BYTES).ok_or(damaged("it is cut off"))?;
        if frame[..8] != MAGIC || frame[8..12] != VERSION.to_le_bytes() {
            return Err(CheckpointError::Version);
        }
        let length = u32::from_le_bytes([frame[12], frame[13], frame[14], frame[15]]) as usize;
        if length > HEADER_BYTES_MAX {
            return Err(damaged("its header"));
        }
        let (header, body) = rest.split_at_checked(length).ok_or(damaged("it is cut off"))?;
        let header: Header = serde_json::from_slice(header).map_err(|_| damaged("its header"))?;
        let numbers = header.tensors.iter().fold(0_usize, |sum, share| sum.saturating_add(share.numbers()));
        if numbers.saturating_mul(4 * KINDS) != body.len() {
            return Err(damaged("its length"));
        }
        Ok(Shard { header, body })
    }

    /// Every tensor with its weights, first and second moments, as bytes.
    fn tensors(&self) -> impl Iterator<Item = (&TensorShare, [&'b [u8]; KINDS])> {
        let mut rest = self.body;
        self.header.tensors.iter().map(move |share| {
            let kinds = std::array::from_fn(|_| {
                let (own, after) = rest.split_at(4 * share.numbers());
                rest = after;
                own
            });
            (share, kinds)
        })
    }

    fn check(&self, spec: &LoraSpec, at: Position) -> Result<(), CheckpointError> {
        let mismatch = |what| Err(CheckpointError::Mismatch(what));
        let header = &self.header;
        if header.job != at.job.to_string() {
            return mismatch("job");
        }
        if header.steps != at.steps {
            return mismatch("step");
        }
        let same = header.rank == spec.rank
            && header.alpha.to_bits() == spec.alpha.to_bits()
            && header.rank_stabilized == spec.rank_stabilized;
        if same { Ok(()) } else { mismatch("adapter") }
    }
}

/// A tensor being put together.
#[derive(Debug)]
struct Pieces {
    share: TensorShare,
    kinds: [Vec<f32>; KINDS],
    found: Vec<bool>,
}

impl Pieces {
    fn new(share: TensorShare) -> Pieces {
        let size = share.numbers();
        Pieces { share, kinds: std::array::from_fn(|_| vec![0.0; size]), found: vec![false; size] }
    }

    /// Takes what of `from` belongs here.
    fn take(&mut self, share: &TensorShare, from: [&[u8]; KINDS]) {
        let own = &self.share;
        let overlap = |a: &Range<usize>, b: &Range<usize>| {
            a.start.max(b.start)..a.end.min(b.end).max(a.start.max(b.start))
        };
        let (rows, columns) = (overlap(&own.rows, &share.rows), overlap(&own.columns, &share.columns));
        if columns.is_empty() {
            return;
        }
        for row in rows {
            let at = |of: &TensorShare| {
                (row - of.rows.start) * of.columns.len() + columns.start - of.columns.start
            };
            let (to, from_at) = (at(own), at(share));
            for (kind, from) in self.kinds.iter_mut().zip(from) {
                let from = from[4 * from_at..4 * (from_at + columns.len())].chunks_exact(4);
                for (to, x) in kind[to..to + columns.len()].iter_mut().zip(from) {
                    *to = f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
                }
            }
            self.found[to..to + columns.len()].fill(true);
        }
    }

    fn check(&self) -> Result<(), CheckpointError> {
        if self.found.iter().all(|&found| found) {
            return Ok(());
        }
        let target = Target::from_module(&self.share.module).map_or("?", Target::module);
        Err(CheckpointError::Missing { layer: self.share.layer, target })
    }
}

/// A rank's share, put together from the shards of any layout.
#[derive(Debug)]
pub struct Restore {
    at: Position,
    spec: LoraSpec,
    optimizer_steps: Option<u32>,
    tensors: BTreeMap<(usize, String, Half), Pieces>,
}

impl Restore {
    /// Begins; nothing has been found yet.
    pub fn new(spec: &LoraSpec, shape: &ModelShape, slice: &RankSlice, at: Position) -> Restore {
        let pieces = shares(spec, shape, slice)
            .into_iter()
            .map(|share| ((share.layer, share.module.clone(), share.half), Pieces::new(share)));
        Restore { at, spec: spec.clone(), optimizer_steps: None, tensors: pieces.collect() }
    }

    /// Takes what is of use from a shard.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] for a shard of something else.
    pub fn take(&mut self, shard: &Shard<'_>) -> Result<(), CheckpointError> {
        shard.check(&self.spec, self.at)?;
        let steps = shard.header.optimizer_steps;
        if *self.optimizer_steps.get_or_insert(steps) != steps {
            return Err(CheckpointError::Mismatch("step"));
        }
        for (share, kinds) in shard.tensors() {
            if let Some(pieces) = self.tensors.get_mut(&(share.layer, share.module.clone(), share.half)) {
                pieces.take(share, kinds);
            }
        }
        Ok(())
    }

    /// The weights, the moments and the optimiser's steps, once every shard has been taken.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] where the shards do not have everything.
    fn finish(self) -> Result<([AdapterWeights; KINDS], u32), CheckpointError> {
        self.tensors.values().try_for_each(Pieces::check)?;
        let mut layers: BTreeMap<usize, [BTreeMap<Target, LoraPair>; KINDS]> = BTreeMap::new();
        for ((layer, module, half), pieces) in self.tensors {
            let target = Target::from_module(&module).ok_or(CheckpointError::Damaged("a module's name"))?;
            for (pairs, numbers) in layers.entry(layer).or_default().iter_mut().zip(pieces.kinds) {
                let pair = pairs.entry(target).or_insert_with(|| LoraPair { a: Vec::new(), b: Vec::new() });
                match half {
                    Half::A => pair.a = numbers,
                    Half::B => pair.b = numbers,
                }
            }
        }
        let mut kinds: [Vec<BTreeMap<Target, LoraPair>>; KINDS] = Default::default();
        for pairs in layers.into_values() {
            kinds.iter_mut().zip(pairs).for_each(|(kind, pairs)| kind.push(pairs));
        }
        let steps = self.optimizer_steps.unwrap_or(0);
        Ok((kinds.map(|layers| AdapterWeights { spec: self.spec.clone(), layers }), steps))
    }

    /// The state, once every shard has been taken.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] where the shards do not have everything.
    pub fn state(
        self,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> Result<AdapterState, CheckpointError> {
        let ([weights, first, second], steps) = self.finish()?;
        Ok(AdapterState::restored(weights, first, second, steps, shape, slice, kernels))
    }

    /// The adapter, once every shard has been taken by a restore of the whole model; and what makes it useless, if anything
    /// does.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] where the shards do not have everything.
    pub fn adapter(self) -> Result<(PeftAdapter, Result<(), String>), CheckpointError> {
        let ([weights, _, second], steps) = self.finish()?;
        let usable = usable(&weights, &second, steps);
        let pairs =
            weights.layers.into_iter().enumerate().flat_map(|(layer, pairs)| {
                pairs.into_iter().map(move |(target, pair)| ((layer, target), pair))
            });
        Ok((PeftAdapter { spec: weights.spec, pairs: pairs.collect() }, usable))
    }
}

/// Why an adapter would be of no use, from its weights and the mean squares of its gradients.
fn usable(weights: &AdapterWeights, squares: &AdapterWeights, steps: u32) -> Result<(), String> {
    if weights.tensors().flatten().any(|x| !x.is_finite()) {
        return Err("a weight of the adapter is no number: lower the learning rate".into());
    }
    let pairs = || weights.layers.iter().flat_map(BTreeMap::values);
    if pairs().all(|pair| pair.b.iter().all(|&x| x == 0.0)) {
        return Err(
            "the adapter changes nothing (every B is zero): train more steps, or raise the learning rate"
                .into(),
        );
    }
    for (layer, squares) in squares.layers.iter().enumerate() {
        for (target, pair) in squares {
            let still = |tensor: &[f32]| tensor.iter().all(|&x| x == 0.0);
            // As long as B is zero, which it is in the first step, A has no gradient.
            if still(&pair.b) || (steps > 1 && still(&pair.a)) {
                let module = target.module();
                return Err(format!(
                    "{module} of layer {layer} never had a gradient: the training data does not reach it"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
