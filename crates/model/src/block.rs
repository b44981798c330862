//! One transformer block, for every architecture and every cut.
//!
//! The residual stream `x` is `rows × hidden`, whole on every rank. Query/key/value and gate/up are column-parallel (one
//! fused product each), the two products back to the hidden width are row-parallel: each rank sums its own parts of the
//! axis, the collective is the upper levels of the same tree.

use crate::adapter::{AdapterStep, Target};
use crate::collective::{Collective, CollectiveError};
use crate::config::ModelConfig;
use crate::kv::LayerCache;
use crate::slice::RankSlice;
use crate::source::{Content, MatrixSource, VectorSource, WeightSource};
use crate::stage::Workspace;
use ashlar_kernels::{
    AttentionShape, Input, Kernels, KvLayout, Output, PackedMatrix, Product, RowContext, StridedRows,
};
use ashlar_vocabulary::Bytes;
use std::ops::Range;

mod backward;

pub(crate) use backward::{Backward, BackwardWork, BlockTape, Sequences};

/// Most ranks of a tensor-parallel group: one per part of an axis.
const RANKS_MAX: usize = 8;

/// A rank's share of one block.
#[derive(Debug)]
pub struct Block {
    input_norm: Vec<f32>,
    qkv: PackedMatrix,
    qkv_bias: Option<Vec<f32>>,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: PackedMatrix,
    output_bias: Option<Vec<f32>>,
    feed_forward_norm: Vec<f32>,
    gate_up: PackedMatrix,
    gate_up_bias: Option<Vec<f32>>,
    down: PackedMatrix,
    down_bias: Option<Vec<f32>>,
    dims: BlockDims,
}

#[derive(Debug)]
struct BlockDims {
    hidden: usize,
    query: usize,
    key: usize,
    feed_forward: usize,
    head_dim: usize,
    attention_parts: Vec<Range<usize>>,
    feed_forward_parts: Vec<Range<usize>>,
    window: Option<u32>,
    eps: f32,
}

/// The name of a part of layer `layer`.
fn name(layer: usize, part: &str) -> String {
    format!("layers.{layer}.{part}")
}

impl Block {
    /// Takes layer `layer`'s share from `weights`.
    pub(crate) fn load<S: WeightSource>(
        weights: &S,
        config: &ModelConfig,
        slice: &RankSlice,
        layer: usize,
    ) -> Result<Block, S::Error> {
        let shape = &config.shape;
        let (hidden, head_dim) = (shape.hidden_size, shape.head_dim);
        let (all_q, all_kv) = (shape.num_heads * head_dim, shape.num_kv_heads * head_dim);
        let (q, kv, ff) = (slice.queries(shape), slice.keys(shape), slice.feed_forward(shape));
        let (whole, ff_all) = (0..hidden, shape.intermediate_size);
        let types = config.shape.weights.layers[layer];
        let attention_parts = shape.attention_cut().rank_parts(slice.tensor_rank, slice.tensor_parallel_size);
        let feed_forward_parts =
            shape.feed_forward_cut().rank_parts(slice.tensor_rank, slice.tensor_parallel_size);
        let stored = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let rows = |suffix: &str, kind, all: usize, rows: &Range<usize>| MatrixSource {
            name: stored(&format!("{suffix}.weight")),
            shape: [all, hidden],
            rows: rows.clone(),
            columns: whole.clone(),
            kind,
        };
        let columns = |suffix: &str, kind, all: usize, columns: &Range<usize>| MatrixSource {
            name: stored(&format!("{suffix}.weight")),
            shape: [hidden, all],
            rows: whole.clone(),
            columns: columns.clone(),
            kind,
        };
        let matrix = |part: &str, sources: &[MatrixSource], parts: &[Range<usize>]| {
            weights.matrix(&name(layer, part), sources, parts)
        };
        let vector = |part: &str, sources: &[(&str, usize, &Range<usize>)]| {
            let source = |&(suffix, length, range): &(&str, usize, &Range<usize>)| VectorSource {
                name: stored(suffix),
                length,
                range: range.clone(),
            };
            weights.vector(&name(layer, part), &sources.iter().map(source).collect::<Vec<_>>())
        };
        let bias = |part: &str, present: bool, sources: &[(&str, usize, &Range<usize>)]| {
            present.then(|| vector(part, sources)).transpose()
        };
        let head_norms = if config.shape.vectors.head_norms {
            let whole_head = 0..head_dim;
            Some((
                vector("query_norm", &[("self_attn.q_norm.weight", head_dim, &whole_head)])?,
                vector("key_norm", &[("self_attn.k_norm.weight", head_dim, &whole_head)])?,
            ))
        } else {
            None
        };
        Ok(Block {
            input_norm: vector("input_norm", &[("input_layernorm.weight", hidden, &whole)])?,
            qkv: matrix(
                "qkv",
                &[
                    rows("self_attn.q_proj", types.query, all_q, &q),
                    rows("self_attn.k_proj", types.key, all_kv, &kv),
                    rows("self_attn.v_proj", types.value, all_kv, &kv),
                ],
                &[0..hidden],
            )?,
            qkv_bias: bias(
                "qkv_bias",
                config.shape.vectors.qkv_bias,
                &[
                    ("self_attn.q_proj.bias", all_q, &q),
                    ("self_attn.k_proj.bias", all_kv, &kv),
                    ("self_attn.v_proj.bias", all_kv, &kv),
                ],
            )?,
            head_norms,
            output: matrix(
                "output",
                &[columns("self_attn.o_proj", types.output, all_q, &q)],
                &attention_parts,
            )?,
            output_bias: bias(
                "output_bias",
                config.shape.vectors.output_bias,
                &[("self_attn.o_proj.bias", hidden, &whole)],
            )?,
            feed_forward_norm: vector(
                "feed_forward_norm",
                &[("post_attention_layernorm.weight", hidden, &whole)],
            )?,
            gate_up: matrix(
                "gate_up",
                &[rows("mlp.gate_proj", types.gate, ff_all, &ff), rows("mlp.up_proj", types.up, ff_all, &ff)],
                &[0..hidden],
            )?,
            gate_up_bias: bias(
                "gate_up_bias",
                config.shape.vectors.feed_forward_bias,
                &[("mlp.gate_proj.bias", ff_all, &ff), ("mlp.up_proj.bias", ff_all, &ff)],
            )?,
            down: matrix("down", &[columns("mlp.down_proj", types.down, ff_all, &ff)], &feed_forward_parts)?,
            down_bias: bias(
                "down_bias",
                config.shape.vectors.feed_forward_bias,
                &[("mlp.down_proj.bias", hidden, &whole)],
            )?,
            dims: BlockDims {
                hidden,
                query: q.len(),
                key: kv.len(),
                feed_forward: ff.len(),
                head_dim,
                attention_parts,
                feed_forward_parts,
                window: config.window(layer),
                eps: config.rms_norm_eps,
            },
        })
    }

    /// What it holds as layer `layer`, under the names by which [`Block::load`] asks for it.
    pub(crate) fn contents(&self, layer: usize) -> Vec<(String, Content<'_>)> {
        let matrices =
            [("qkv", &self.qkv), ("output", &self.output), ("gate_up", &self.gate_up), ("down", &self.down)];
        let (query_norm, key_norm) = self.head_norms.as_ref().map(|(query, key)| (query, key)).unzip();
        let vectors = [
            ("input_norm", Some(&self.input_norm)),
            ("qkv_bias", self.qkv_bias.as_ref()),
            ("query_norm", query_norm),
            ("key_norm", key_norm),
            ("output_bias", self.output_bias.as_ref()),
            ("feed_forward_norm", Some(&self.feed_forward_norm)),
            ("gate_up_bias", self.gate_up_bias.as_ref()),
            ("down_bias", self.down_bias.as_ref()),
        ];
        let matrices = matrices.into_iter().map(|(part, matrix)| (part, Content::Matrix(matrix)));
        let vectors = vectors.into_iter().filter_map(|(part, vector)| Some((part, Content::Vector(vector?))));
        matrices.chain(vectors).map(|(part, content)| (name(layer, part), content)).collect()
    }

    /// Words that the largest of the block's products takes for its activations.
    pub(crate) fn scratch_words(&self, rows: usize) -> usize {
        let products = [&self.qkv, &self.output, &self.gate_up, &self.down];
        products.iter().map(|m| m.scratch_words(rows)).max().unwrap_or(0)
    }

    /// Memory of the packed weights, with all norms and biases.
    pub fn bytes(&self) -> Bytes {
        let products = [&self.qkv, &self.output, &self.gate_up, &self.down];
        let biases = [&self.qkv_bias, &self.output_bias, &self.gate_up_bias, &self.down_bias];
        let norms = [&self.input_norm, &self.feed_forward_norm];
        let head_norms = self.head_norms.iter().flat_map(|(query, key)| [query, key]);
        let vectors = norms.into_iter().chain(biases.into_iter().flatten()).chain(head_norms);
        let elements: usize = vectors.map(Vec::len).sum();
        Bytes(products.iter().map(|m| m.bytes() as u64).sum::<u64>() + 4 * elements as u64)
    }

    /// Adds the block's attention and feed-forward to the residual stream `work.x`. A `tape` receives what the backward pass
    /// needs.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward(
        &self,
        kernels: &Kernels,
        rows: &[RowContext<'_>],
        cache: &mut LayerCache,
        group: &mut dyn Collective,
        adapters: &AdapterStep<'_>,
        mut tape: Option<&mut BlockTape>,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        self.attention(kernels, rows, cache, group, adapters, tape.as_deref_mut(), work)?;
        self.feed_forward(kernels, rows.len(), group, adapters, tape, work)
    }

    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        kernels: &Kernels,
        rows: &[RowContext<'_>],
        cache: &mut LayerCache,
        group: &mut dyn Collective,
        adapters: &AdapterStep<'_>,
        mut tape: Option<&mut BlockTape>,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let d = &self.dims;
        let (count, stride) = (rows.len(), d.query + 2 * d.key);
        let layout = KvLayout { kv_heads: d.key / d.head_dim, head_dim: d.head_dim };
        let qkv = &mut work.wide[..count * stride];
        let x = &work.x[..count * d.hidden];
        let normed = &mut work.normed[..count * d.hidden];
        let product = Product {
            rows: count,
            weights: &self.qkv,
            k_parts: &[0..d.hidden],
            bias: self.qkv_bias.as_deref(),
        };
        let input = if adapters.is_none() {
            Input::Normed { x, weight: &self.input_norm, eps: d.eps, room: normed }
        } else {
            // Adapters read the normed rows, too.
            kernels.rms_norm(count, d.hidden, x, &self.input_norm, d.eps, normed);
            Input::Rows(normed)
        };
        kernels.product(&product, input, Output::Write(qkv));
        let normed = &work.normed[..count * d.hidden];
        for (target, at) in self.qkv_targets() {
            let low = tape.as_deref_mut().map(|tape| &mut tape.low);
            adapters.add(
                kernels,
                target,
                normed,
                &mut qkv[at.start..],
                stride,
                group,
                &mut work.adapters,
                low,
            )?;
        }
        if let Some(tape) = tape.as_deref_mut() {
            tape.keep_input(&work.x[..count * d.hidden]);
            if self.head_norms.is_some() {
                tape.keep_heads(qkv, stride, d.query + d.key);
            }
        }
        if let Some((q_norm, k_norm)) = &self.head_norms {
            kernels.rms_norm_in_place(count, d.query / d.head_dim, d.head_dim, qkv, stride, q_norm, d.eps);
            let keys = &mut qkv[d.query..];
            kernels.rms_norm_in_place(count, layout.kv_heads, d.head_dim, keys, stride, k_norm, d.eps);
        }
        let half = d.head_dim / 2;
        let (cos, sin) = (&work.cos[..count * half], &work.sin[..count * half]);
        // Queries and keys are neighbours, so one rotation covers both.
        kernels.rope(count, (d.query + d.key) / d.head_dim, d.head_dim, qkv, stride, cos, sin);
        let keys = StridedRows { data: &qkv[d.query..], stride };
        let values = StridedRows { data: &qkv[d.query + d.key..], stride };
        kernels.write_kv(layout, rows, keys, values, &mut cache.keys, &mut cache.values);
        let shape = AttentionShape {
            layout,
            q_heads: d.query / d.head_dim,
            scale: 1.0 / (d.head_dim as f32).sqrt(),
            window: d.window,
            softcap: None,
        };
        let attended = &mut work.narrow[..count * d.query];
        let queries = StridedRows { data: qkv, stride };
        kernels.attention(&shape, rows, queries, &cache.keys, &cache.values, attended);
        if let Some(tape) = tape.as_deref_mut() {
            tape.keep_attention(kernels, qkv, (stride, d.query), cache.keys.kind(), attended);
        }
        self.reduce_into_residual(
            kernels,
            count,
            Target::Output,
            &self.output,
            &d.attention_parts,
            self.output_bias.as_deref(),
            group,
            adapters,
            tape,
            work,
        )
    }

    /// What of the fused QKV product belongs to which target.
    fn qkv_targets(&self) -> [(Target, Range<usize>); 3] {
        let (query, key) = (self.dims.query, self.dims.key);
        [
            (Target::Query, 0..query),
            (Target::Key, query..query + key),
            (Target::Value, query + key..query + 2 * key),
        ]
    }

    /// What of the fused gate/up product belongs to which target.
    fn gate_up_targets(&self) -> [(Target, Range<usize>); 2] {
        let feed_forward = self.dims.feed_forward;
        [(Target::Gate, 0..feed_forward), (Target::Up, feed_forward..2 * feed_forward)]
    }

    fn feed_forward(
        &self,
        kernels: &Kernels,
        count: usize,
        group: &mut dyn Collective,
        adapters: &AdapterStep<'_>,
        mut tape: Option<&mut BlockTape>,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let d = &self.dims;
        let x = &work.x[..count * d.hidden];
        let normed = &mut work.normed[..count * d.hidden];
        let gate_up = &mut work.wide[..count * 2 * d.feed_forward];
        let activated = &mut work.narrow[..count * d.feed_forward];
        let product = Product {
            rows: count,
            weights: &self.gate_up,
            k_parts: &[0..d.hidden],
            bias: self.gate_up_bias.as_deref(),
        };
        if adapters.is_none() && tape.is_none() {
            let input = Input::Normed { x, weight: &self.feed_forward_norm, eps: d.eps, room: normed };
            kernels.product(&product, input, Output::SiluMul { out: activated, room: gate_up });
        } else {
            // Adapters add to gates and ups, and the tape keeps them: both need them in memory.
            kernels.rms_norm(count, d.hidden, x, &self.feed_forward_norm, d.eps, normed);
            kernels.product(&product, Input::Rows(normed), Output::Write(gate_up));
            for (target, at) in self.gate_up_targets() {
                let (low, stride) = (tape.as_deref_mut().map(|tape| &mut tape.low), 2 * d.feed_forward);
                adapters.add(
                    kernels,
                    target,
                    normed,
                    &mut gate_up[at.start..],
                    stride,
                    group,
                    &mut work.adapters,
                    low,
                )?;
            }
            if let Some(tape) = tape.as_deref_mut() {
                tape.keep_feed_forward(&work.x[..count * d.hidden], gate_up);
            }
            kernels.silu_mul(count, d.feed_forward, gate_up, activated);
        }
        self.reduce_into_residual(
            kernels,
            count,
            Target::Down,
            &self.down,
            &d.feed_forward_parts,
            self.down_bias.as_deref(),
            group,
            adapters,
            tape,
            work,
        )
    }

    /// `x += product(narrow) + bias`, summed over the group in the contract's tree.
    #[allow(clippy::too_many_arguments)]
    fn reduce_into_residual(
        &self,
        kernels: &Kernels,
        count: usize,
        target: Target,
        weights: &PackedMatrix,
        parts: &[Range<usize>],
        bias: Option<&[f32]>,
        group: &mut dyn Collective,
        adapters: &AdapterStep<'_>,
        tape: Option<&mut BlockTape>,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let size = count * self.dims.hidden;
        let input = &work.narrow[..count * weights.k()];
        if group.size() == 1 && adapters.is_none() {
            let product = Product { rows: count, weights, k_parts: parts, bias };
            kernels.product(
                &product,
                Input::Rows(input),
                Output::Add { y: &mut work.x[..size], stride: self.dims.hidden },
            );
            return Ok(());
        }
        let partial = &mut work.normed[..size];
        kernels.matmul(count, input, weights, parts, None, partial);
        if group.size() > 1 {
            let all = &mut work.gathered[..size * group.size()];
            group.all_gather(partial, all)?;
            let mut contributions: [&[f32]; RANKS_MAX] = [&[]; RANKS_MAX];
            for (to, contribution) in contributions.iter_mut().zip(all.chunks_exact(size)) {
                *to = contribution;
            }
            kernels.sum_tree(&contributions[..group.size()], partial);
        }
        if let Some(bias) = bias {
            for row in partial.chunks_exact_mut(self.dims.hidden) {
                kernels.add(row, bias);
            }
        }
        let (hidden, low) = (self.dims.hidden, tape.map(|tape| &mut tape.low));
        adapters.add(kernels, target, input, partial, hidden, group, &mut work.adapters, low)?;
        kernels.add(&mut work.x[..size], partial);
        Ok(())
    }
}
