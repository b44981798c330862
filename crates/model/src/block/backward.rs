//! The gradient of a block by its input, and by whatever of its weights and adapters trains.
//!
//! What [`Block::forward`] computed lies on a [`BlockTape`]. Of a column-parallel product a rank has a partial gradient of the
//! inputs, which goes through the group in the contract's tree, together with that of the adapters' low-rank inputs; of a
//! row-parallel one it has all that belongs to its own inputs. The order of every sum is that of `NUMERICS.md`.

use super::{Block, BlockDims};
use crate::adapter::{Adapter, AdapterDropout, PackedPair, Target, copied, grown, sum_over_group};
use crate::collective::{Collective, CollectiveError};
use crate::tensors::{AdapterHalf, LayerTensor, TensorId, Tensors};
use ashlar_kernels::{AttentionShape, Kernels, KvLayout, PackedMatrix, StridedRows};
use ashlar_vocabulary::FloatType;
use std::ops::Range;

/// What a block's forward pass leaves for its backward pass.
#[derive(Debug, Default)]
pub(crate) struct BlockTape {
    /// The residual stream before the block: rows × hidden.
    pub(crate) input: Vec<f32>,
    /// Queries and keys before their norms, where heads have norms: rows × (query + key).
    heads: Vec<f32>,
    /// Rotated queries and keys, and values; keys and values as the cache holds them: rows × (query + 2·key).
    qkv: Vec<f32>,
    /// What attention made of them: rows × query.
    attended: Vec<f32>,
    /// The residual stream between attention and feed-forward: rows × hidden.
    middle: Vec<f32>,
    /// rows × 2·feed-forward.
    gate_up: Vec<f32>,
    /// Per target s·A·x: rows × rank.
    pub(super) low: [Vec<f32>; 7],
}

impl BlockTape {
    /// Forgets what it holds, but not the memory.
    pub(crate) fn clear(&mut self) {
        let own = [
            &mut self.input,
            &mut self.heads,
            &mut self.qkv,
            &mut self.attended,
            &mut self.middle,
            &mut self.gate_up,
        ];
        own.into_iter().chain(&mut self.low).for_each(Vec::clear);
    }

    pub(crate) fn keep_input(&mut self, x: &[f32]) {
        copied(&mut self.input, x);
    }

    pub(super) fn keep_heads(&mut self, qkv: &[f32], stride: usize, width: usize) {
        self.heads.clear();
        self.heads.reserve_exact(qkv.len() / stride * width);
        qkv.chunks_exact(stride).for_each(|row| self.heads.extend_from_slice(&row[..width]));
    }

    pub(super) fn keep_attention(
        &mut self,
        kernels: &Kernels,
        qkv: &[f32],
        (stride, query): (usize, usize),
        kind: FloatType,
        attended: &[f32],
    ) {
        copied(&mut self.qkv, qkv);
        self.qkv.chunks_exact_mut(stride).for_each(|row| kernels.round_to(kind, &mut row[query..]));
        copied(&mut self.attended, attended);
    }

    pub(super) fn keep_feed_forward(&mut self, x: &[f32], gate_up: &[f32]) {
        copied(&mut self.middle, x);
        copied(&mut self.gate_up, gate_up);
    }

    /// Memory that it takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let own = [&self.input, &self.heads, &self.qkv, &self.attended, &self.middle, &self.gate_up];
        own.into_iter().chain(&self.low).map(|buffer| 4 * buffer.capacity()).sum()
    }
}

/// The rows of a micro-batch, as the backward pass sees them.
pub(crate) struct Sequences<'a> {
    /// The rows of each sequence, from position 0 on.
    pub(crate) ranges: &'a [Range<usize>],
    /// Cosines and *negated* sines of the rows' angles: a rotation back.
    pub(crate) cos: &'a [f32],
    pub(crate) back_sin: &'a [f32],
}

/// Buffers of a backward pass, grown when they are first needed.
#[derive(Debug, Default)]
pub(crate) struct BackwardWork {
    normed: Vec<f32>,
    wide: Vec<f32>,
    inputs: Vec<f32>,
    narrow: Vec<f32>,
    exchange: Vec<f32>,
    low: Vec<f32>,
    gathered: Vec<f32>,
    /// What dropout leaves of an adapter's inputs, then the gradient by them.
    dropped: Vec<f32>,
}

impl BackwardWork {
    /// Memory that it takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let BackwardWork { normed, wide, inputs, narrow, exchange, low, gathered, dropped } = self;
        [normed, wide, inputs, narrow, exchange, low, gathered, dropped]
            .map(|buffer| 4 * buffer.capacity())
            .iter()
            .sum()
    }
}

/// Everything that a block's backward pass is given beside the gradient.
pub(crate) struct Backward<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) sequences: Sequences<'a>,
    /// The layer, counted over the model.
    pub(crate) layer: usize,
    /// The same, counted from the stage's first.
    pub(crate) index: usize,
    /// The adapter that its rows had.
    pub(crate) adapter: Option<&'a Adapter>,
    /// What it did not see of its inputs.
    pub(crate) dropout: Option<&'a AdapterDropout<'a>>,
    pub(crate) tape: &'a BlockTape,
}

impl Block {
    /// Turns the gradient by the block's output into that by its input, and adds the gradient of each of its tensors that `sink`
    /// has. All ranks of the group call it with the same gradient, and get the same.
    pub(crate) fn backward(
        &self,
        with: &Backward<'_>,
        gradient: &mut [f32],
        sink: &mut Tensors,
        group: &mut dyn Collective,
        work: &mut BackwardWork,
    ) -> Result<(), CollectiveError> {
        self.feed_forward_backward(with, gradient, sink, group, work)?;
        self.attention_backward(with, gradient, sink, group, work)
    }

    fn feed_forward_backward(
        &self,
        with: &Backward<'_>,
        gradient: &mut [f32],
        sink: &mut Tensors,
        group: &mut dyn Collective,
        work: &mut BackwardWork,
    ) -> Result<(), CollectiveError> {
        let (d, tape, kernels) = (&self.dims, with.tape, with.kernels);
        let count = gradient.len() / d.hidden;
        let activated = grown(&mut work.inputs, count * d.feed_forward);
        kernels.silu_mul(count, d.feed_forward, &tape.gate_up, activated);
        let d_activated = grown(&mut work.narrow, count * d.feed_forward);
        with.row_parallel(
            Target::Down,
            &self.down,
            gradient,
            activated,
            d_activated,
            sink,
            (&mut work.low, &mut work.dropped),
        );
        let d_gate_up = grown(&mut work.wide, count * 2 * d.feed_forward);
        kernels.silu_mul_gradient(count, d.feed_forward, &tape.gate_up, d_activated, d_gate_up);
        let normed = grown(&mut work.normed, count * d.hidden);
        kernels.rms_norm(count, d.hidden, &tape.middle, &self.feed_forward_norm, d.eps, normed);
        let shifted = |part: &Range<usize>, by: usize| part.start + by..part.end + by;
        let parts: Vec<_> = d
            .feed_forward_parts
            .iter()
            .map(|part| vec![part.clone(), shifted(part, d.feed_forward)])
            .collect();
        let targets =
            self.gate_up_targets().map(|(target, columns)| (target, columns, &d.feed_forward_parts[..]));
        let rows = StridedRows { data: d_gate_up, stride: 2 * d.feed_forward };
        let product =
            ColumnParallel { weights: &self.gate_up, parts: &parts, targets: &targets, rows, input: normed };
        let d_normed = with.column_parallel(
            &product,
            sink,
            group,
            (&mut work.exchange, &mut work.gathered, &mut work.dropped),
        )?;
        let middle = StridedRows { data: &tape.middle, stride: d.hidden };
        let norm = &self.feed_forward_norm;
        with.norm_weight(LayerTensor::FeedForwardNorm, middle, d.eps, d_normed, sink);
        kernels.rms_norm_gradient(count, 1, d.hidden, middle, norm, d.eps, d_normed, d.hidden);
        kernels.add(gradient, d_normed);
        Ok(())
    }

    fn attention_backward(
        &self,
        with: &Backward<'_>,
        gradient: &mut [f32],
        sink: &mut Tensors,
        group: &mut dyn Collective,
        work: &mut BackwardWork,
    ) -> Result<(), CollectiveError> {
        let (d, tape, kernels) = (&self.dims, with.tape, with.kernels);
        let (count, stride) = (gradient.len() / d.hidden, d.query + 2 * d.key);
        let d_attended = grown(&mut work.narrow, count * d.query);
        let attended = &tape.attended[..];
        with.row_parallel(
            Target::Output,
            &self.output,
            gradient,
            attended,
            d_attended,
            sink,
            (&mut work.low, &mut work.dropped),
        );
        let d_qkv = grown(&mut work.wide, count * stride);
        let shape = AttentionShape {
            layout: KvLayout { kv_heads: d.key / d.head_dim, head_dim: d.head_dim },
            q_heads: d.query / d.head_dim,
            scale: 1.0 / (d.head_dim as f32).sqrt(),
            window: d.window,
            softcap: None,
        };
        let qkv = StridedRows { data: &tape.qkv, stride };
        let Sequences { ranges, cos, back_sin } = with.sequences;
        kernels.attention_gradient(&shape, ranges, qkv, attended, d_attended, d_qkv);
        let rotated = (d.query + d.key) / d.head_dim;
        kernels.rope(count, rotated, d.head_dim, d_qkv, stride, cos, back_sin);
        if let Some((q_norm, k_norm)) = &self.head_norms {
            let (heads, kv_heads) = (d.query / d.head_dim, d.key / d.head_dim);
            let width = d.query + d.key;
            let queries = StridedRows { data: &tape.heads, stride: width };
            let keys = StridedRows { data: &tape.heads[d.query..], stride: width };
            let key_parts: Vec<_> = d.key_parts().collect();
            let of_queries = StridedRows { data: d_qkv, stride };
            let of_keys = StridedRows { data: &d_qkv[d.query..], stride };
            let dims = (count, d.head_dim, d.eps);
            with.head_norm(LayerTensor::QueryNorm, dims, &d.attention_parts, queries, of_queries, sink);
            with.head_norm(LayerTensor::KeyNorm, dims, &key_parts, keys, of_keys, sink);
            kernels.rms_norm_gradient(count, heads, d.head_dim, queries, q_norm, d.eps, d_qkv, stride);
            let d_keys = &mut d_qkv[d.query..];
            kernels.rms_norm_gradient(count, kv_heads, d.head_dim, keys, k_norm, d.eps, d_keys, stride);
        }
        let normed = grown(&mut work.normed, count * d.hidden);
        kernels.rms_norm(count, d.hidden, &tape.input, &self.input_norm, d.eps, normed);
        // A part of the attention axis has some query heads and the KV heads that they share.
        let key_parts: Vec<_> = d.key_parts().collect();
        let parts: Vec<_> = d
            .attention_parts
            .iter()
            .zip(&key_parts)
            .map(|(query, key)| {
                let shifted = |by: usize| key.start + by..key.end + by;
                vec![query.clone(), shifted(d.query), shifted(d.query + d.key)]
            })
            .collect();
        let targets = self.qkv_targets().map(|(target, columns)| {
            let parts = if target == Target::Query { &d.attention_parts } else { &key_parts };
            (target, columns, &parts[..])
        });
        let rows = StridedRows { data: d_qkv, stride };
        let product =
            ColumnParallel { weights: &self.qkv, parts: &parts, targets: &targets, rows, input: normed };
        let d_normed = with.column_parallel(
            &product,
            sink,
            group,
            (&mut work.exchange, &mut work.gathered, &mut work.dropped),
        )?;
        let input = StridedRows { data: &tape.input, stride: d.hidden };
        with.norm_weight(LayerTensor::InputNorm, input, d.eps, d_normed, sink);
        kernels.rms_norm_gradient(count, 1, d.hidden, input, &self.input_norm, d.eps, d_normed, d.hidden);
        kernels.add(gradient, d_normed);
        Ok(())
    }
}

impl BlockDims {
    /// The keys (or values) of each part of the attention axis: those that its query heads share.
    fn key_parts(&self) -> impl Iterator<Item = Range<usize>> {
        let per_key = self.query / self.key;
        self.attention_parts.iter().map(move |part| part.start / per_key..part.end / per_key)
    }
}

/// A target, its columns among a fused product's outputs, and the parts of these.
type TargetColumns<'a> = (Target, Range<usize>, &'a [Range<usize>]);

/// A column-parallel product whose gradient is wanted.
struct ColumnParallel<'a> {
    weights: &'a PackedMatrix,
    /// The parts of its outputs, over all matrices of a fused product.
    parts: &'a [Vec<Range<usize>>],
    /// Whose outputs they are.
    targets: &'a [TargetColumns<'a>],
    /// The gradient by the outputs.
    rows: StridedRows<'a>,
    /// What it multiplied: rows × inputs.
    input: &'a [f32],
}

impl Backward<'_> {
    fn pair(&self, target: Target) -> Option<(&PackedPair, &Adapter)> {
        let adapter = self.adapter?;
        Some((adapter.layers[self.index].pairs[target.index()].as_ref()?, adapter))
    }

    /// The gradient by the inputs of a column-parallel product and its adapters: rows × inputs, in `exchange`.
    fn column_parallel<'w>(
        &self,
        product: &ColumnParallel<'_>,
        sink: &mut Tensors,
        group: &mut dyn Collective,
        (exchange, gathered, dropped): (&'w mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>),
    ) -> Result<&'w mut [f32], CollectiveError> {
        let (kernels, inputs) = (self.kernels, product.weights.k());
        let count = product.input.len() / inputs;
        let pairs: Vec<_> = product
            .targets
            .iter()
            .filter_map(|(target, columns, parts)| Some((*target, columns, parts, self.pair(*target)?)))
            .collect();
        let rank = self.adapter.map_or(0, |adapter| adapter.rank);
        let all = grown(exchange, count * (inputs + rank * pairs.len()));
        let (d_input, mut d_low) = all.split_at_mut(count * inputs);
        kernels.input_gradient(count, product.rows, product.weights, product.parts, d_input);
        let gradient_of = |columns: &Range<usize>| StridedRows {
            data: &product.rows.data[columns.start..],
            stride: product.rows.stride,
        };
        for (_, columns, parts, (pair, _)) in &pairs {
            let (own, rest) = d_low.split_at_mut(count * rank);
            let parts: Vec<_> = parts.iter().map(|part| vec![part.clone()]).collect();
            kernels.input_gradient(count, gradient_of(columns), &pair.b, &parts, own);
            d_low = rest;
        }
        for (target, columns, _) in product.targets {
            let input = StridedRows { data: product.input, stride: inputs };
            self.linear(*target, count, (gradient_of(columns), columns.len()), (input, inputs), sink);
        }
        // One exchange for all of them.
        sum_over_group(kernels, all, group, gathered)?;
        let (d_input, mut d_low) = all.split_at_mut(count * inputs);
        for (target, columns, _, (pair, adapter)) in &pairs {
            let (own, rest) = d_low.split_at_mut(count * rank);
            let d_out = gradient_of(columns);
            self.low_rank(*target, pair, adapter, d_out, product.input, own, d_input, sink, dropped);
            d_low = rest;
        }
        Ok(d_input)
    }

    /// The gradient by the inputs of a row-parallel product and its adapter.
    #[allow(clippy::too_many_arguments)]
    fn row_parallel(
        &self,
        target: Target,
        weights: &PackedMatrix,
        gradient: &[f32],
        input: &[f32],
        d_input: &mut [f32],
        sink: &mut Tensors,
        (low, dropped): (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        let outputs = weights.n();
        let count = gradient.len() / outputs;
        let rows = StridedRows { data: gradient, stride: outputs };
        let uncut = [vec![0..outputs]];
        self.kernels.input_gradient(count, rows, weights, &uncut, d_input);
        let inputs = weights.k();
        self.linear(
            target,
            count,
            (rows, outputs),
            (StridedRows { data: input, stride: inputs }, inputs),
            sink,
        );
        if let Some((pair, adapter)) = self.pair(target) {
            let d_low = grown(low, count * adapter.rank);
            self.kernels.input_gradient(count, rows, &pair.b, &uncut, d_low);
            self.low_rank(target, pair, adapter, rows, input, d_low, d_input, sink, dropped);
        }
    }

    /// Adds the gradients of a linear layer's own matrix and bias, where they train: that of a bias is the gradient of the matrix
    /// of an input that is always 1.
    fn linear(
        &self,
        target: Target,
        count: usize,
        d_out: (StridedRows<'_>, usize),
        input: (StridedRows<'_>, usize),
        sink: &mut Tensors,
    ) {
        if let Some(sink) = sink.get_mut(TensorId::Layer(self.layer, LayerTensor::Weight(target))) {
            self.kernels.weight_gradient(count, d_out, input, sink);
        }
        if let Some(sink) = sink.get_mut(TensorId::Layer(self.layer, LayerTensor::Bias(target))) {
            let one = StridedRows { data: &[1.0], stride: 0 };
            self.kernels.weight_gradient(count, d_out, (one, 1), sink);
        }
    }

    /// Adds the gradient of a norm's weight, where it trains: `x` was normed, `gradient` is by what came out.
    fn norm_weight(
        &self,
        which: LayerTensor,
        x: StridedRows<'_>,
        eps: f32,
        gradient: &[f32],
        sink: &mut Tensors,
    ) {
        let Some(sink) = sink.get_mut(TensorId::Layer(self.layer, which)) else { return };
        let dy = StridedRows { data: gradient, stride: x.stride };
        self.kernels.rms_norm_weight_gradient(gradient.len() / x.stride, 1, x.stride, x, eps, dy, sink);
    }

    /// The same of a norm of heads: a sum for each part of the attention axis, which come together at the end of a batch.
    fn head_norm(
        &self,
        which: LayerTensor,
        (count, head_dim, eps): (usize, usize, f32),
        parts: &[Range<usize>],
        x: StridedRows<'_>,
        dy: StridedRows<'_>,
        sink: &mut Tensors,
    ) {
        let Some(sink) = sink.get_mut(TensorId::Layer(self.layer, which)) else { return };
        for (part, sink) in parts.iter().zip(sink.chunks_exact_mut(head_dim)) {
            let x = StridedRows { data: &x.data[part.start..], stride: x.stride };
            let dy = StridedRows { data: &dy.data[part.start..], stride: dy.stride };
            let heads = part.len() / head_dim;
            self.kernels.rms_norm_weight_gradient(count, heads, head_dim, x, eps, dy, sink);
        }
    }

    /// What a pair adds, once the gradient by s·A·x, `d_low`, is whole: its own gradients, and that by its inputs.
    #[allow(clippy::too_many_arguments)]
    fn low_rank(
        &self,
        target: Target,
        pair: &PackedPair,
        adapter: &Adapter,
        d_out: StridedRows<'_>,
        input: &[f32],
        d_low: &mut [f32],
        d_input: &mut [f32],
        sink: &mut Tensors,
        dropped: &mut Vec<f32>,
    ) {
        let (kernels, rank, inputs) = (self.kernels, adapter.rank, pair.a.k());
        let count = d_low.len() / rank;
        let half = |half| TensorId::Adapter(self.layer, target, half);
        if let Some(sink) = sink.get_mut(half(AdapterHalf::B)) {
            let low = StridedRows { data: &self.tape.low[target.index()], stride: rank };
            kernels.weight_gradient(count, (d_out, pair.b.n()), (low, rank), sink);
        }
        kernels.scale(d_low, adapter.factor);
        let rows = StridedRows { data: d_low, stride: rank };
        let dropout = self.dropout.map(|dropout| dropout.of(self.index, target, 0..count));
        let dropped = grown(dropped, if dropout.is_some() { count * inputs } else { 0 });
        if let Some(sink) = sink.get_mut(half(AdapterHalf::A)) {
            let mut seen = input;
            if let Some(dropout) = &dropout {
                kernels.drop_out(dropout, inputs, input, dropped);
                seen = dropped;
            }
            let seen = StridedRows { data: seen, stride: inputs };
            kernels.weight_gradient(count, (rows, rank), (seen, inputs), sink);
        }
        let uncut = [vec![0..rank]];
        match &dropout {
            None => kernels.add_input_gradient(count, rows, &pair.a, &uncut, d_input),
            Some(dropout) => {
                kernels.input_gradient(count, rows, &pair.a, &uncut, dropped);
                kernels.add_dropped(dropout, inputs, dropped, d_input);
            }
        }
    }
}
