//! One transformer block, for every architecture and every cut.
//!
//! The residual stream `x` is `rows × hidden`, whole on every rank. Query/key/value and gate/up are column-parallel (one
//! fused product each), the two products back to the hidden width are row-parallel: each rank sums its own parts of the
//! axis, the collective is the upper levels of the same tree.

use crate::collective::{Collective, CollectiveError};
use crate::config::ModelConfig;
use crate::kv::LayerCache;
use crate::pack::{PackSource, pack};
use crate::slice::RankSlice;
use crate::stage::Workspace;
use crate::weights::{WeightError, WeightFiles};
use ashlar_kernels::{AttentionShape, Kernels, KvLayout, PackedMatrix, RowContext, StridedRows};
use ashlar_vocabulary::Bytes;
use std::ops::Range;

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

impl Block {
    /// Reads layer `layer`'s share.
    pub fn load(
        files: &WeightFiles,
        kernels: &Kernels,
        config: &ModelConfig,
        slice: &RankSlice,
        layer: usize,
    ) -> Result<Block, WeightError> {
        let shape = &config.shape;
        let (hidden, head_dim) = (shape.hidden_size, shape.head_dim);
        let (all_q, all_kv) = (shape.num_heads * head_dim, shape.num_kv_heads * head_dim);
        let (q, kv, ff) = (slice.queries(shape), slice.keys(shape), slice.feed_forward(shape));
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let vector = |suffix: &str, length: usize, range: Range<usize>| {
            let reader = files.tensor(&name(suffix), &[length])?;
            reader.read(0..1, range)
        };
        let fused_bias = |pieces: &[(&str, usize, &Range<usize>)]| -> Result<Vec<f32>, WeightError> {
            let mut bias = Vec::new();
            for (suffix, length, range) in pieces {
                bias.extend(vector(suffix, *length, (*range).clone())?);
            }
            Ok(bias)
        };
        let types = config.shape.weights.layers[layer];
        let (attention_parts, feed_forward_parts) = (
            shape.attention_cut().rank_parts(slice.tensor_rank, slice.tensor_parallel_size),
            shape.feed_forward_cut().rank_parts(slice.tensor_rank, slice.tensor_parallel_size),
        );
        let piece = |suffix: &str, kind, shape: [usize; 2], rows: &Range<usize>, columns: &Range<usize>| {
            PackSource { name: name(suffix), shape, rows: rows.clone(), columns: columns.clone(), kind }
        };
        let load = |pieces: &[PackSource], parts: &[Range<usize>]| pack(files, kernels, pieces, parts);
        let whole = 0..hidden;
        let ff_all = shape.intermediate_size;
        Ok(Block {
            input_norm: vector("input_layernorm.weight", hidden, 0..hidden)?,
            qkv: load(
                &[
                    piece("self_attn.q_proj.weight", types.query, [all_q, hidden], &q, &whole),
                    piece("self_attn.k_proj.weight", types.key, [all_kv, hidden], &kv, &whole),
                    piece("self_attn.v_proj.weight", types.value, [all_kv, hidden], &kv, &whole),
                ],
                &[0..hidden],
            )?,
            qkv_bias: config
                .qkv_bias
                .then(|| {
                    fused_bias(&[
                        ("self_attn.q_proj.bias", all_q, &q),
                        ("self_attn.k_proj.bias", all_kv, &kv),
                        ("self_attn.v_proj.bias", all_kv, &kv),
                    ])
                })
                .transpose()?,
            head_norms: config
                .head_norms
                .then(|| {
                    Ok::<_, WeightError>((
                        vector("self_attn.q_norm.weight", head_dim, 0..head_dim)?,
                        vector("self_attn.k_norm.weight", head_dim, 0..head_dim)?,
                    ))
                })
                .transpose()?,
            output: load(
                &[piece("self_attn.o_proj.weight", types.output, [hidden, all_q], &whole, &q)],
                &attention_parts,
            )?,
            output_bias: config
                .output_bias
                .then(|| vector("self_attn.o_proj.bias", hidden, 0..hidden))
                .transpose()?,
            feed_forward_norm: vector("post_attention_layernorm.weight", hidden, 0..hidden)?,
            gate_up: load(
                &[
                    piece("mlp.gate_proj.weight", types.gate, [ff_all, hidden], &ff, &whole),
                    piece("mlp.up_proj.weight", types.up, [ff_all, hidden], &ff, &whole),
                ],
                &[0..hidden],
            )?,
            gate_up_bias: config
                .mlp_bias
                .then(|| {
                    fused_bias(&[("mlp.gate_proj.bias", ff_all, &ff), ("mlp.up_proj.bias", ff_all, &ff)])
                })
                .transpose()?,
            down: load(
                &[piece("mlp.down_proj.weight", types.down, [hidden, ff_all], &whole, &ff)],
                &feed_forward_parts,
            )?,
            down_bias: config
                .mlp_bias
                .then(|| vector("mlp.down_proj.bias", hidden, 0..hidden))
                .transpose()?,
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

    /// Words that the largest of the block's products takes for its activations.
    pub(crate) fn scratch_words(&self, rows: usize) -> usize {
        let products = [&self.qkv, &self.output, &self.gate_up, &self.down];
        products.iter().map(|m| m.scratch_words(rows)).max().unwrap_or(0)
    }

    /// Memory of the packed weights.
    pub fn bytes(&self) -> Bytes {
        let products = [&self.qkv, &self.output, &self.gate_up, &self.down];
        let vectors = self.input_norm.len() + self.feed_forward_norm.len();
        Bytes(products.iter().map(|m| m.bytes() as u64).sum::<u64>() + 4 * vectors as u64)
    }

    /// Adds the block's attention and feed-forward to the residual stream `work.x`.
    pub fn forward(
        &self,
        kernels: &Kernels,
        rows: &[RowContext<'_>],
        cache: &mut LayerCache,
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        self.attention(kernels, rows, cache, group, work)?;
        self.feed_forward(kernels, rows.len(), group, work)
    }

    fn attention(
        &self,
        kernels: &Kernels,
        rows: &[RowContext<'_>],
        cache: &mut LayerCache,
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let d = &self.dims;
        let (count, stride) = (rows.len(), d.query + 2 * d.key);
        let layout = KvLayout { kv_heads: d.key / d.head_dim, head_dim: d.head_dim };
        let normed = &mut work.normed[..count * d.hidden];
        kernels.rms_norm(count, d.hidden, &work.x[..count * d.hidden], &self.input_norm, d.eps, normed);
        let qkv = &mut work.wide[..count * stride];
        kernels.matmul(count, normed, &self.qkv, &[0..d.hidden], self.qkv_bias.as_deref(), qkv);
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
        self.reduce_into_residual(
            kernels,
            count,
            &self.output,
            &d.attention_parts,
            self.output_bias.as_deref(),
            group,
            work,
        )
    }

    fn feed_forward(
        &self,
        kernels: &Kernels,
        count: usize,
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let d = &self.dims;
        let normed = &mut work.normed[..count * d.hidden];
        kernels.rms_norm(
            count,
            d.hidden,
            &work.x[..count * d.hidden],
            &self.feed_forward_norm,
            d.eps,
            normed,
        );
        let gate_up = &mut work.wide[..count * 2 * d.feed_forward];
        kernels.matmul(count, normed, &self.gate_up, &[0..d.hidden], self.gate_up_bias.as_deref(), gate_up);
        let activated = &mut work.narrow[..count * d.feed_forward];
        kernels.silu_mul(count, d.feed_forward, gate_up, activated);
        self.reduce_into_residual(
            kernels,
            count,
            &self.down,
            &d.feed_forward_parts,
            self.down_bias.as_deref(),
            group,
            work,
        )
    }

    /// `x += product(narrow) + bias`, summed over the group in the contract's tree.
    #[allow(clippy::too_many_arguments)]
    fn reduce_into_residual(
        &self,
        kernels: &Kernels,
        count: usize,
        weights: &PackedMatrix,
        parts: &[Range<usize>],
        bias: Option<&[f32]>,
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), CollectiveError> {
        let size = count * self.dims.hidden;
        let input = &work.narrow[..count * weights.k()];
        let partial = &mut work.normed[..size];
        kernels.matmul(count, input, weights, parts, None, partial);
        if group.size() > 1 {
            let all = &mut work.gathered[..size * group.size()];
            group.all_gather(partial, all)?;
            let contributions: Vec<&[f32]> = all.chunks_exact(size).collect();
            kernels.sum_tree(&contributions, partial);
        }
        if let Some(bias) = bias {
            for row in partial.chunks_exact_mut(self.dims.hidden) {
                kernels.add(row, bias);
            }
        }
        kernels.add(&mut work.x[..size], partial);
        Ok(())
    }
}
