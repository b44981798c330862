//! Low-rank adapters (LoRA, Hu et al. 2021): y = W·x + B·(s·A·x) on any linear layer, with A of `rank` rows, B of `rank`
//! columns, and s = α/rank (α/√rank for rsLoRA, Kalajdzievski 2023).
//!
//! A rank of a tensor-parallel group holds what meets its slice: behind a column-parallel layer all of A and its rows of B;
//! behind a row-parallel one its columns of A, whose partial sums go through the group, and all of B. Of two ranks that hold
//! the same matrix each computes the same bits.

use crate::collective::{Collective, CollectiveError};
use crate::slice::RankSlice;
use crate::tensors::{AdapterHalf, TensorId, Tensors};
use crate::trained::Trained;
use ashlar_kernels::{Dropout, DropoutRow, Input, Kernels, Output, PackedMatrix, Product};
use ashlar_vocabulary::{Bytes, ModelShape, WeightType};
use std::ops::Range;

/// A linear layer of a block that an adapter can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// From the attended heads back to the hidden width.
    Output,
    /// The gate of the feed-forward layer.
    Gate,
    /// Its other half.
    Up,
    /// From the feed-forward width back to the hidden width.
    Down,
}

impl Target {
    /// Every target, in the order in which a block uses them.
    pub const ALL: [Target; 7] =
        [Target::Query, Target::Key, Target::Value, Target::Output, Target::Gate, Target::Up, Target::Down];

    /// The module's name in Hugging Face's models, for instance `q_proj`.
    pub fn module(self) -> &'static str {
        match self {
            Target::Query => "q_proj",
            Target::Key => "k_proj",
            Target::Value => "v_proj",
            Target::Output => "o_proj",
            Target::Gate => "gate_proj",
            Target::Up => "up_proj",
            Target::Down => "down_proj",
        }
    }

    /// The module's path inside a layer, for instance `self_attn.q_proj`.
    pub fn path(self) -> String {
        let parent = if self <= Target::Output { "self_attn" } else { "mlp" };
        format!("{parent}.{}", self.module())
    }

    /// The target with this module name.
    pub fn from_module(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|target| target.module() == name)
    }

    /// Whether a rank holds some of the layer's inputs and all of its outputs, instead of the other way around.
    pub fn is_row_parallel(self) -> bool {
        matches!(self, Target::Output | Target::Down)
    }

    /// (outputs, inputs) of the whole layer.
    pub fn dimensions(self, shape: &ModelShape) -> (usize, usize) {
        let (hidden, feed_forward) = (shape.hidden_size, shape.intermediate_size);
        let (query, key) = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim);
        match self {
            Target::Query => (query, hidden),
            Target::Key | Target::Value => (key, hidden),
            Target::Output => (hidden, query),
            Target::Gate | Target::Up => (feed_forward, hidden),
            Target::Down => (hidden, feed_forward),
        }
    }

    /// The outputs of the layer that `slice` computes.
    pub fn outputs(self, shape: &ModelShape, slice: &RankSlice) -> Range<usize> {
        match self {
            Target::Query => slice.queries(shape),
            Target::Key | Target::Value => slice.keys(shape),
            Target::Gate | Target::Up => slice.feed_forward(shape),
            Target::Output | Target::Down => 0..shape.hidden_size,
        }
    }

    /// The inputs of the layer that `slice` has.
    pub fn inputs(self, shape: &ModelShape, slice: &RankSlice) -> Range<usize> {
        match self {
            Target::Output => slice.queries(shape),
            Target::Down => slice.feed_forward(shape),
            _ => 0..shape.hidden_size,
        }
    }

    /// The parts in which those inputs add up.
    fn input_parts(self, shape: &ModelShape, slice: &RankSlice) -> Vec<Range<usize>> {
        let (rank, size) = (slice.tensor_rank, slice.tensor_parallel_size);
        match self {
            Target::Output => shape.attention_cut().rank_parts(rank, size),
            Target::Down => shape.feed_forward_cut().rank_parts(rank, size),
            _ => std::iter::once(0..shape.hidden_size).collect(),
        }
    }

    /// Its place in [`Target::ALL`].
    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

/// What an adapter's matrices mean.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Rows of A.
    pub rank: usize,
    /// α.
    pub alpha: f64,
    /// Whether the factor is α/√rank instead of α/rank.
    pub rank_stabilized: bool,
    /// Which layers it changes, in the order of [`Target::ALL`].
    pub targets: Vec<Target>,
}

impl LoraSpec {
    /// The factor of B·A.
    pub fn factor(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }) as f32
    }
}

/// One layer's pair, as numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// A: rank × inputs.
    pub a: Vec<f32>,
    /// B: outputs × rank.
    pub b: Vec<f32>,
}

/// A rank's share of an adapter, as numbers: what training moves.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterWeights {
    /// What it is.
    pub spec: LoraSpec,
    /// Its matrices: layer by layer, target by target, A before B.
    pub tensors: Tensors,
}

impl AdapterWeights {
    /// The rank's share of whole matrices: `whole(layer, target)` gives A (rank × inputs) and B (outputs × rank) of a layer of
    /// the model.
    pub fn cut<E>(
        spec: &LoraSpec,
        shape: &ModelShape,
        slice: &RankSlice,
        mut whole: impl FnMut(usize, Target) -> Result<LoraPair, E>,
    ) -> Result<AdapterWeights, E> {
        let layout = Trained::Adapter(spec.clone()).weights(shape, slice);
        let mut second_half = Vec::new();
        let tensors = Tensors::cut(&layout, |share| match share.id {
            TensorId::Adapter(layer, target, AdapterHalf::A) => {
                let LoraPair { a, b } = whole(layer, target)?;
                second_half = b;
                Ok(a)
            }
            // B follows its A.
            _ => Ok(std::mem::take(&mut second_half)),
        })?;
        Ok(AdapterWeights { spec: spec.clone(), tensors })
    }
}

/// A rank's share of an adapter, packed for products. Immutable: what trains packs a new one per step.
#[derive(Debug)]
pub struct Adapter {
    pub(crate) factor: f32,
    pub(crate) rank: usize,
    pub(crate) layers: Vec<LayerAdapter>,
}

/// One layer's pairs, by [`Target::index`].
#[derive(Debug, Default)]
pub(crate) struct LayerAdapter {
    pub(crate) pairs: [Option<PackedPair>; 7],
}

/// A pair, packed.
#[derive(Debug)]
pub(crate) struct PackedPair {
    pub(crate) a: PackedMatrix,
    pub(crate) b: PackedMatrix,
    /// The parts of A's inputs.
    pub(crate) parts: Vec<Range<usize>>,
}

impl Adapter {
    /// Packs a rank's share.
    pub fn pack(
        weights: &AdapterWeights,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> Adapter {
        Adapter::pack_tensors(&weights.spec, &weights.tensors, shape, slice, kernels)
    }

    /// [`Adapter::pack`] of tensors that train.
    pub fn pack_tensors(
        spec: &LoraSpec,
        weights: &Tensors,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> Adapter {
        let rank = spec.rank;
        let matrix = |rows: usize, parts: &[Range<usize>], from: &[f32]| {
            let columns = parts.last().map_or(0, |part| part.end);
            PackedMatrix::pack(WeightType::F32, rows, parts, kernels.pool(), &|row, to| {
                to.copy_from_slice(&from[row * columns..(row + 1) * columns]);
            })
        };
        let whole_rank: [Range<usize>; 1] = [0..rank];
        let pair = |layer: usize, target: Target| {
            let half = |half| weights.get(TensorId::Adapter(layer, target, half));
            let parts = target.input_parts(shape, slice);
            let outputs = target.outputs(shape, slice).len();
            let a = matrix(rank, &parts, half(AdapterHalf::A)?);
            let b = matrix(outputs, &whole_rank, half(AdapterHalf::B)?);
            Some(PackedPair { a, b, parts })
        };
        let layer = |layer: usize| LayerAdapter { pairs: Target::ALL.map(|target| pair(layer, target)) };
        let layers = (slice.layers.start..slice.layers.end).map(layer).collect();
        Adapter { factor: spec.factor(), rank, layers }
    }

    /// Memory of the packed matrices.
    pub fn bytes(&self) -> Bytes {
        let pair = |pair: &PackedPair| pair.a.bytes() + pair.b.bytes();
        Bytes(self.pairs().map(pair).sum::<usize>() as u64)
    }

    fn pairs(&self) -> impl Iterator<Item = &PackedPair> {
        self.layers.iter().flat_map(|layer| layer.pairs.iter().flatten())
    }
}

/// Rows of a step that an adapter changes.
#[derive(Debug, Clone)]
pub struct AdaptedRows<'a> {
    /// Which rows.
    pub rows: Range<usize>,
    /// By what.
    pub adapter: &'a Adapter,
}

/// Buffers of adapters' products, grown when they are first needed.
#[derive(Debug, Default)]
pub(crate) struct AdapterWork {
    low: Vec<f32>,
    gathered: Vec<f32>,
    dropped: Vec<f32>,
}

impl AdapterWork {
    /// Makes room for steps of up to `rows` rows that all have `adapter`, in a group of `ranks`. Returns the words that its
    /// products take of the kernels.
    pub(crate) fn reserve(&mut self, adapter: &Adapter, rows: usize, ranks: usize) -> usize {
        grown(&mut self.low, rows * adapter.rank);
        if ranks > 1 {
            grown(&mut self.gathered, rows * adapter.rank * ranks);
        }
        let words = |pair: &PackedPair| pair.a.scratch_words(rows).max(pair.b.scratch_words(rows));
        adapter.pairs().map(words).max().unwrap_or(0)
    }

    /// Reserved values.
    pub(crate) fn values(&self) -> usize {
        self.low.len() + self.gathered.len() + self.dropped.len()
    }
}

/// The first `len` elements of a buffer that grows.
pub(crate) fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        // To what is needed and no further: ledgers count on it.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Copies into a buffer that keeps its memory from one micro-batch to the next: fresh pages cost as much as the copy. It grows to
/// what is needed and no further: ledgers count on it.
pub(crate) fn copied(to: &mut Vec<f32>, from: &[f32]) {
    to.clear();
    to.reserve_exact(from.len());
    to.extend_from_slice(from);
}

/// Dropout of what adapters read in a micro-batch that trains.
#[derive(Debug, Clone)]
pub(crate) struct AdapterDropout<'a> {
    threshold: u32,
    factor: f32,
    rows: &'a [DropoutRow],
    /// The stage's first layer.
    first_layer: usize,
    /// Per target the first of its inputs that this rank has.
    first_inputs: [usize; 7],
}

impl<'a> AdapterDropout<'a> {
    pub(crate) fn new(
        (threshold, factor): (u32, f32),
        rows: &'a [DropoutRow],
        shape: &ModelShape,
        slice: &RankSlice,
    ) -> AdapterDropout<'a> {
        let first_inputs = Target::ALL.map(|target| target.inputs(shape, slice).start);
        AdapterDropout { threshold, factor, rows, first_layer: slice.layers.start, first_inputs }
    }

    /// That of a target on the stage's layer `layer`, for `rows` of the micro-batch.
    pub(crate) fn of(&self, layer: usize, target: Target, rows: Range<usize>) -> Dropout<'a> {
        let stream = (self.first_layer + layer) * Target::ALL.len() + target.index();
        Dropout {
            threshold: self.threshold,
            factor: self.factor,
            rows: &self.rows[rows],
            stream: stream as u32,
            first: self.first_inputs[target.index()],
        }
    }
}

/// A layer's place among the adapters of a step.
pub(crate) struct AdapterStep<'a> {
    /// The layer, counted from the stage's first.
    pub(crate) layer: usize,
    /// The rows with adapters.
    pub(crate) adapted: &'a [AdaptedRows<'a>],
    /// What they do not see of their inputs.
    pub(crate) dropout: Option<&'a AdapterDropout<'a>>,
}

impl AdapterStep<'_> {
    /// Whether no row has an adapter: then nothing but a product's own results is needed.
    pub(crate) fn is_none(&self) -> bool {
        self.adapted.is_empty()
    }

    /// Adds B·(s·A·x) to the outputs of `target`, of which row r lies at `out[r · stride]`; `input` is rows × inputs, of which
    /// dropout leaves x. `keep` receives s·A·x where a backward pass will need it.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn add(
        &self,
        kernels: &Kernels,
        target: Target,
        input: &[f32],
        out: &mut [f32],
        stride: usize,
        group: &mut dyn Collective,
        work: &mut AdapterWork,
        mut keep: Option<&mut [Vec<f32>; 7]>,
    ) -> Result<(), CollectiveError> {
        for AdaptedRows { rows, adapter } in self.adapted {
            let Some(pair) = &adapter.layers[self.layer].pairs[target.index()] else { continue };
            let (inputs, count) = (pair.a.k(), rows.len());
            let low = grown(&mut work.low, count * adapter.rank);
            let mut input = &input[rows.start * inputs..rows.end * inputs];
            if let Some(dropout) = self.dropout {
                let dropped = grown(&mut work.dropped, count * inputs);
                kernels.drop_out(&dropout.of(self.layer, target, rows.clone()), inputs, input, dropped);
                input = dropped;
            }
            kernels.matmul(count, input, &pair.a, &pair.parts, None, low);
            if target.is_row_parallel() {
                sum_over_group(kernels, low, group, &mut work.gathered)?;
            }
            kernels.scale(low, adapter.factor);
            let uncut: [Range<usize>; 1] = [0..adapter.rank];
            let product = Product { rows: count, weights: &pair.b, k_parts: &uncut, bias: None };
            let y = &mut out[rows.start * stride..];
            kernels.product(&product, Input::Rows(low), Output::Add { y, stride });
            if let Some(keep) = &mut keep {
                copied(&mut keep[target.index()], low);
            }
        }
        Ok(())
    }
}

/// Replaces a rank's partial sums by those of the group, in the contract's tree.
pub(crate) fn sum_over_group(
    kernels: &Kernels,
    partial: &mut [f32],
    group: &mut dyn Collective,
    gathered: &mut Vec<f32>,
) -> Result<(), CollectiveError> {
    if group.size() == 1 || partial.is_empty() {
        return Ok(());
    }
    let size = partial.len();
    let all = grown(gathered, size * group.size());
    group.all_gather(partial, all)?;
    let contributions: Vec<&[f32]> = all.chunks_exact(size).collect();
    kernels.sum_tree(&contributions, partial);
    Ok(())
}
