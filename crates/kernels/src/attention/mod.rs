//! Attention over a paged cache of keys and values.
//!
//! Layout: [`buffer`](KvBuffer) (memory and element types), [`layout`](KvLayout) (blocks, rows, writing), `split` (256 keys
//! for a few queries: scores, softmax, output), `tile` (the register tiles of both products), this file (which task does
//! what, and the merge of splits).
//!
//! Order, per row and query head: keys form splits of 256 counted from position 0. Within a split, a score is one
//! ascending chain over the head's elements, times the scale, and with a soft cap c it is c·tanh(score/c);
//! p = e^(score − max); the sum of p takes sixteen
//! accumulators (key modulo 16) and a fixed tree; the output is one ascending chain over keys. Splits merge in ascending
//! order. Keys outside the row's window take part in nothing, whatever the cache holds there.

mod buffer;
mod gradient;
mod layout;
mod split;
mod tile;

pub use buffer::KvBuffer;
pub use layout::{BLOCK_TOKENS, KvLayout, RowContext};

use crate::kernels::Kernels;
use crate::lanes::{LaneKernel, Simd16};
use crate::strided::{DisjointMut, StridedRows};
use ashlar_vocabulary::AttentionMemory;
pub use ashlar_vocabulary::attention::SPLIT_KEYS;
use split::{Partial, Scratch, SplitInputs};
use std::cell::Cell;
use std::ops::Range;

/// What attention computes, apart from its operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Layout of the cache, with this rank's KV heads.
    pub layout: KvLayout,
    /// This rank's query heads: a multiple of its KV heads, grouped by KV head.
    pub q_heads: usize,
    /// Factor of the scores, usually 1/√head_dim; positive.
    pub scale: f32,
    /// Sliding window: a key counts if position − key < window.
    pub window: Option<u32>,
    /// Soft cap of the scores: c·tanh(score/c); positive.
    pub softcap: Option<f32>,
}

impl Kernels {
    /// Attention of `rows` over the cache, into `out` (rows × q_heads·head_dim).
    ///
    /// Row `r` of `q` begins with its q_heads·head_dim query elements. A row attends to the keys 0…position of its block
    /// table (of its window), all of which must have been written, its own among them. Rows of one sequence that follow
    /// each other with the same block-table slice share loads; that has no effect on results.
    ///
    /// # Panics
    /// If a length does not fit, or a row's block table is too short or points outside the caches.
    pub fn attention(
        &self,
        shape: &AttentionShape,
        rows: &[RowContext<'_>],
        q: StridedRows<'_>,
        k_cache: &KvBuffer,
        v_cache: &KvBuffer,
        out: &mut [f32],
    ) {
        let AttentionShape { layout, q_heads, .. } = *shape;
        assert!(
            q_heads > 0 && q_heads.is_multiple_of(layout.kv_heads),
            "query heads are a multiple of KV heads"
        );
        assert!(shape.scale > 0.0, "the scale is positive");
        assert!(shape.softcap.is_none_or(|softcap| softcap > 0.0), "the soft cap is positive");
        assert_eq!(out.len(), rows.len() * q_heads * layout.head_dim, "out is rows × q_heads·head_dim");
        rows.iter().for_each(RowContext::assert_covered);
        assert_eq!(k_cache.kind(), v_cache.kind(), "keys and values are of one type");
        let kv_heads = shape.layout.kv_heads;
        let call = Call { shape: *shape, rows, q, k_cache, v_cache };
        let mut room = self.attention_room();
        let AttentionRoom { tiles, partials } = &mut *room;
        let memory = self.attention_memory(layout, q_heads);
        call.cut_into(tiles, memory.task_rows());
        let tiles = &tiles[..];
        let tasks = tiles.len() * kv_heads;
        let splits = tiles.iter().map(|tile| call.splits(tile.clone()).len()).max().unwrap_or(0);
        let output = DisjointMut::new(out);
        if memory.cuts_splits(tiles.len()) && splits > 1 {
            let window = memory.window(tiles.len()).min(splits);
            return self.attention_over_splits(&call, tiles, splits, window, partials, &output);
        }
        self.pool().run(tasks, &|task| {
            // Head by head, so that its keys and values stay in the L2 cache. Later tiles of a chunk have longer contexts:
            // they go first, so that threads finish together.
            let (kv_head, tile) = (task / tiles.len(), &tiles[tiles.len() - 1 - task % tiles.len()]);
            let splits = call.splits(tile.clone());
            self.dispatch(Task {
                call: &call,
                rows: tile.clone(),
                kv_head,
                splits,
                sink: Sink::Output(&output),
            });
        });
    }

    /// The same with splits computed by different tasks, for few rows with long contexts: a window of splits at a time, so
    /// that memory does not grow with the context.
    fn attention_over_splits(
        &self,
        call: &Call<'_>,
        tiles: &[Range<usize>],
        most_splits: usize,
        window: usize,
        partials: &mut Vec<f32>,
        output: &DisjointMut<'_>,
    ) {
        let AttentionShape { layout, q_heads, .. } = call.shape;
        let width = Partial::floats(layout.head_dim);
        // Per row and query head: what is merged so far, then the window's splits.
        let slot_floats = (window + 1) * width;
        let floats = call.rows.len() * q_heads * slot_floats;
        if partials.len() < floats {
            partials.resize(floats, 0.0);
        }
        for slot in partials[..floats].chunks_exact_mut(slot_floats) {
            Partial::nothing(&mut slot[..width]);
        }
        let store = DisjointMut::new(partials);
        let tile_of = |row: usize| tiles.partition_point(|tile| tile.end <= row);
        for from in (0..most_splits).step_by(window) {
            self.pool().run(tiles.len() * layout.kv_heads * window, &|task| {
                let (task, index) = (task / window, task % window);
                let (tile, kv_head) = (tiles[task / layout.kv_heads].clone(), task % layout.kv_heads);
                let Some(split) = call.splits(tile.clone()).nth(from + index) else { return };
                let sink = Sink::Partials { store: &store, slot_floats, at: (index + 1) * width };
                self.dispatch(Task { call, rows: tile, kv_head, splits: split..split + 1, sink });
            });
            let last = from + window >= most_splits;
            self.pool().run(call.rows.len() * layout.kv_heads, &|task| {
                let (row, kv_head) = (task / layout.kv_heads, task % layout.kv_heads);
                // The row's splits in this window, counted from the window's first.
                let first = call.splits(tiles[tile_of(row)].clone()).start + from;
                let own = call.splits(row..row + 1);
                let own = own.start.clamp(first, first + window) - first
                    ..own.end.clamp(first, first + window) - first;
                for head in kv_head * call.group()..(kv_head + 1) * call.group() {
                    let slot = row * q_heads + head;
                    // SAFETY: one task per row and head, and all tasks that wrote these have ended.
                    let (partials, out) = unsafe {
                        (
                            store.range(slot * slot_floats..(slot + 1) * slot_floats),
                            output.range(slot * layout.head_dim..(slot + 1) * layout.head_dim),
                        )
                    };
                    let (own, out, head_dim) = (own.clone(), last.then_some(out), layout.head_dim);
                    self.dispatch(MergePartials { partials, own, out, head_dim });
                }
            });
        }
    }

    /// Makes room for attention of up to `rows` rows, so that no call allocates; answers its bytes, and those of the threads'
    /// own memory, which they take when they first need it.
    pub fn reserve_attention(&self, rows: usize, layout: KvLayout, q_heads: usize) -> usize {
        let memory = self.attention_memory(layout, q_heads);
        let mut room = self.attention_room();
        let missing = memory.waiting_floats(rows).saturating_sub(room.partials.len());
        room.partials.extend(std::iter::repeat_n(0.0, missing));
        let missing = rows.saturating_sub(room.tiles.len());
        room.tiles.reserve(missing);
        memory.bytes(rows)
    }

    fn attention_memory(&self, layout: KvLayout, query_heads: usize) -> AttentionMemory {
        let KvLayout { kv_heads, head_dim } = layout;
        AttentionMemory { threads: self.threads(), query_heads, kv_heads, head_dim }
    }
}

/// Memory of the call being computed.
#[derive(Debug, Default)]
pub(crate) struct AttentionRoom {
    /// Runs of rows that are computed together.
    tiles: Vec<Range<usize>>,
    /// Results of splits that are not merged yet.
    partials: Vec<f32>,
}

/// The operands of one call.
struct Call<'a> {
    shape: AttentionShape,
    rows: &'a [RowContext<'a>],
    q: StridedRows<'a>,
    k_cache: &'a KvBuffer,
    v_cache: &'a KvBuffer,
}

impl Call<'_> {
    /// Query heads per KV head.
    #[inline(always)]
    fn group(&self) -> usize {
        self.shape.q_heads / self.shape.layout.kv_heads
    }

    /// The keys that a row attends to.
    #[inline(always)]
    fn keys(&self, row: usize) -> Range<usize> {
        let end = self.rows[row].position as usize + 1;
        let start = self.shape.window.map_or(0, |window| end.saturating_sub(window.max(1) as usize));
        start..end
    }

    /// The splits that some of these rows attend to.
    #[inline(always)]
    fn splits(&self, rows: Range<usize>) -> Range<usize> {
        let (mut start, mut end) = (usize::MAX, 0);
        for row in rows {
            let keys = self.keys(row);
            start = start.min(keys.start / SPLIT_KEYS);
            end = end.max(keys.end.div_ceil(SPLIT_KEYS));
        }
        start..end
    }

    /// Runs of at most `most` rows that share a block table.
    fn cut_into(&self, tiles: &mut Vec<Range<usize>>, most: usize) {
        tiles.clear();
        for (row, context) in self.rows.iter().enumerate() {
            match tiles.last_mut() {
                Some(tile) if tile.len() < most && self.rows[tile.start].shares_table(context) => {
                    tile.end = row + 1
                }
                _ => tiles.push(row..row + 1),
            }
        }
    }
}

/// Where a task's results go.
#[derive(Clone, Copy)]
enum Sink<'a> {
    /// The splits are all there are: merge them here.
    Output(&'a DisjointMut<'a>),
    /// Keep the split's result, `at` so many floats from the beginning of its row's and query head's slot.
    Partials { store: &'a DisjointMut<'a>, slot_floats: usize, at: usize },
}

/// Some rows of one sequence, one KV head, some splits.
struct Task<'a> {
    call: &'a Call<'a>,
    rows: Range<usize>,
    kv_head: usize,
    splits: Range<usize>,
    sink: Sink<'a>,
}

thread_local! {
    /// Reused from task to task.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

impl LaneKernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let mut scratch = SCRATCH.take().unwrap_or_default();
        self.run_with::<S>(&mut scratch);
        SCRATCH.set(Some(scratch));
    }
}

impl Task<'_> {
    #[inline(always)]
    fn run_with<S: Simd16>(self, scratch: &mut Scratch) {
        let Task { call, rows, kv_head, splits, sink } = self;
        let AttentionShape { layout, q_heads, scale, softcap, .. } = call.shape;
        let (group, head_dim) = (call.group(), layout.head_dim);
        let width = Partial::floats(head_dim);
        scratch.begin(rows.len() * group, layout);
        for (index, row) in rows.clone().enumerate() {
            let q = call.q.row(row, q_heads * head_dim);
            let heads = q[kv_head * group * head_dim..].chunks_exact(head_dim).take(group);
            for (head, q) in heads.enumerate() {
                scratch.set_query(index * group + head, q);
            }
        }
        for split in splits {
            let start = split * SPLIT_KEYS;
            scratch.keys.clear();
            for row in rows.clone() {
                let keys = call.keys(row);
                let low = keys.start.clamp(start, start + SPLIT_KEYS) - start;
                let high = keys.end.clamp(start, start + SPLIT_KEYS) - start;
                scratch.keys.extend(std::iter::repeat_n(low..high.max(low), group));
            }
            let inputs = SplitInputs {
                layout,
                kv_head,
                scale,
                softcap,
                table: call.rows[rows.start].block_table,
                first_block: start / BLOCK_TOKENS,
                k_cache: call.k_cache,
                v_cache: call.v_cache,
            };
            inputs.run::<S>(scratch);
            for query in 0..rows.len() * group {
                if scratch.keys[query].is_empty() {
                    continue;
                }
                let partial = Partial::of(&scratch.partials, query, head_dim);
                match sink {
                    Sink::Output(_) => {
                        Partial::merge::<S>(&mut scratch.merged[query * width..][..width], partial)
                    }
                    Sink::Partials { store, slot_floats, at } => {
                        let (row, head) = (rows.start + query / group, kv_head * group + query % group);
                        let start = (row * q_heads + head) * slot_floats + at;
                        // SAFETY: one place per row, head and split, and one task for each.
                        unsafe { store.range(start..start + width) }.copy_from_slice(partial);
                    }
                }
            }
        }
        if let Sink::Output(output) = sink {
            for query in 0..rows.len() * group {
                let (row, head) = (rows.start + query / group, kv_head * group + query % group);
                let slot = row * q_heads + head;
                // SAFETY: one task per row and head.
                let out = unsafe { output.range(slot * head_dim..(slot + 1) * head_dim) };
                Partial::finish::<S>(Partial::of(&scratch.merged, query, head_dim), out);
            }
        }
    }
}

/// The ascending merge of the splits `own` of one row and head into what comes before them.
struct MergePartials<'a> {
    partials: &'a mut [f32],
    own: Range<usize>,
    /// The result, once all are merged.
    out: Option<&'a mut [f32]>,
    head_dim: usize,
}

impl LaneKernel for MergePartials<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let width = Partial::floats(self.head_dim);
        let (merged, window) = self.partials.split_at_mut(width);
        for partial in window.chunks_exact(width).take(self.own.end).skip(self.own.start) {
            Partial::merge::<S>(merged, partial);
        }
        if let Some(out) = self.out {
            Partial::finish::<S>(merged, out);
        }
    }
}
