//! The bytes of a model's weights on one rank, as they lie in memory, and what its products work in: exact, so that a plan's
//! ledger is.

use crate::head::HeadSlice;
use crate::packed::{matrix_bytes, row_words, stacked_row_words};
use crate::parts::AxisCut;
use crate::shape::ModelShape;
use crate::weights::WeightType;
use std::ops::Range;

/// Norms and biases are `f32`, whatever the products are.
const BYTES_PER_VECTOR_ELEMENT: usize = 4;

impl ModelShape {
    /// Bytes of layer `layer` on rank `rank` of `tensor_parallel_size`: its slices of the products, with their biases and
    /// norms.
    pub fn layer_bytes(&self, layer: usize, rank: usize, tensor_parallel_size: usize) -> usize {
        let Some(types) = self.weights.layers.get(layer) else { return 0 };
        let len = |cut: AxisCut| cut.rank(rank, tensor_parallel_size).len();
        let (query, key, wide) =
            (len(self.attention_cut()), len(self.key_cut()), len(self.feed_forward_cut()));
        let columns = |kind: WeightType, cut: AxisCut| {
            let parts = cut.rank_parts(rank, tensor_parallel_size);
            matrix_bytes(kind, self.hidden_size, cut.rank(rank, tensor_parallel_size).start, &parts)
        };
        self.row_bytes(&[(types.query, query), (types.key, key), (types.value, key)])
            + columns(types.output, self.attention_cut())
            + self.row_bytes(&[(types.gate, wide), (types.up, wide)])
            + columns(types.down, self.feed_forward_cut())
            + BYTES_PER_VECTOR_ELEMENT * self.vector_elements(query, key, wide)
    }

    /// Numbers of a layer on rank `rank` of `tensor_parallel_size`: its slices of the matrices, with their biases and norms.
    pub fn layer_numbers(&self, rank: usize, tensor_parallel_size: usize) -> usize {
        let len = |cut: AxisCut| cut.rank(rank, tensor_parallel_size).len();
        let (query, key, wide) =
            (len(self.attention_cut()), len(self.key_cut()), len(self.feed_forward_cut()));
        (2 * query + 2 * key + 3 * wide) * self.hidden_size + self.vector_elements(query, key, wide)
    }

    /// 32-bit words that the largest product of layer `layer` takes for each row of its activations on rank `rank` of
    /// `tensor_parallel_size`.
    pub fn layer_row_words(&self, layer: usize, rank: usize, tensor_parallel_size: usize) -> usize {
        let Some(types) = self.weights.layers.get(layer) else { return 0 };
        let hidden: [Range<usize>; 1] = [0..self.hidden_size];
        let columns = |kind: WeightType, cut: AxisCut| {
            let start = cut.rank(rank, tensor_parallel_size).start;
            row_words(kind, start, &cut.rank_parts(rank, tensor_parallel_size))
        };
        let products = [
            stacked_row_words(&[types.query, types.key, types.value], 0, &hidden),
            columns(types.output, self.attention_cut()),
            stacked_row_words(&[types.gate, types.up], 0, &hidden),
            columns(types.down, self.feed_forward_cut()),
        ];
        products.into_iter().max().unwrap_or(0)
    }

    /// The same of the head.
    pub fn head_row_words(&self) -> usize {
        let hidden: [Range<usize>; 1] = [0..self.hidden_size];
        row_words(self.weights.head, 0, &hidden)
    }

    /// Bytes of a slice of the head.
    pub fn head_bytes(&self, slice: HeadSlice) -> usize {
        self.row_bytes(&[(self.weights.head, slice.rows(self).len())])
    }

    /// Bytes of rank `rank`'s slice of the embedding where it is a table of its own, in whole rows as files have them.
    pub fn table_bytes(&self, rank: usize, tensor_parallel_size: usize) -> usize {
        let rows = self.vocab_cut().rank(rank, tensor_parallel_size).len();
        rows * self.weights.embedding.bytes(self.hidden_size)
    }

    /// Bytes of the norm before the head.
    pub fn head_norm_bytes(&self) -> usize {
        BYTES_PER_VECTOR_ELEMENT * self.hidden_size
    }

    /// Bytes of products over the hidden axis, stacked: neighbours of one type are one matrix.
    fn row_bytes(&self, stacked: &[(WeightType, usize)]) -> usize {
        let hidden: [Range<usize>; 1] = [0..self.hidden_size];
        let run = |run: &[(WeightType, usize)]| {
            matrix_bytes(run[0].0, run.iter().map(|(_, outputs)| outputs).sum(), 0, &hidden)
        };
        stacked.chunk_by(|a, b| a.0 == b.0).map(run).sum()
    }

    fn vector_elements(&self, query: usize, key: usize, wide: usize) -> usize {
        let vectors = &self.vectors;
        let if_any = |present: bool, elements: usize| if present { elements } else { 0 };
        2 * self.hidden_size
            + if_any(vectors.qkv_bias, query + 2 * key)
            + if_any(vectors.output_bias, self.hidden_size)
            + if_any(vectors.feed_forward_bias, 2 * wide + self.hidden_size)
            + if_any(vectors.head_norms, 2 * self.head_dim)
    }
}
