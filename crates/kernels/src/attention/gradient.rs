//! The gradient of attention, for whole sequences whose keys and values lie in rows.
//!
//! Order, per sequence and KV head: query heads ascend, within them blocks of 48 queries counted from position 0. Of a
//! block, scores are computed anew as the forward pass does; p = e^(score − max) / Σ with the sum over keys in sixteen
//! accumulators (key modulo 16) and a fixed tree; D = Σ dO·O likewise over the head's elements; dS = p·(dP − D)·scale. dQ is
//! one ascending chain over keys, dK and dV are one chain over query heads, then queries. A key that a query does not attend
//! to adds a zero.

use super::AttentionShape;
use crate::Isa;
use crate::aligned::AlignedBuffer;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::math;
use crate::matmul::PanelRun;
use crate::strided::{DisjointMut, StridedRows};
use ashlar_vocabulary::GradientMemory;
use ashlar_vocabulary::gradient::QUERIES;
use std::cell::Cell;
use std::ops::Range;

/// Keys, or elements of a head, of a panel.
const PANEL: usize = 4 * LANES;

impl Kernels {
    /// Memory that [`Kernels::attention_gradient`] takes for sequences of up to `rows` rows, in bytes.
    pub fn attention_gradient_bytes(&self, rows: usize, head_dim: usize) -> usize {
        GradientMemory { threads: self.threads() }.attention_bytes(rows, head_dim)
    }

    /// The gradient of attention by queries, keys and values, where each range of `sequences` is the rows of one sequence
    /// from position 0 on.
    ///
    /// A row of `qkv` begins with the q_heads query heads as they were rotated, then the KV heads' keys and values *as the
    /// cache holds them*; `out` (rows × q_heads·head_dim) is what attention made of it, `d_out` the gradient by that. `d_qkv`
    /// has the rows of `qkv`; rows of no sequence are left as they are.
    ///
    /// # Panics
    /// If a length does not fit, or the shape has a soft cap.
    pub fn attention_gradient(
        &self,
        shape: &AttentionShape,
        sequences: &[Range<usize>],
        qkv: StridedRows<'_>,
        out: &[f32],
        d_out: &[f32],
        d_qkv: &mut [f32],
    ) {
        assert!(shape.softcap.is_none(), "soft caps have no gradient yet");
        let kv_heads = shape.layout.kv_heads;
        assert!(shape.q_heads.is_multiple_of(kv_heads), "query heads are a multiple of KV heads");
        assert_eq!(out.len(), d_out.len(), "the output and its gradient are of one length");
        let d_qkv = DisjointMut::new(d_qkv);
        self.pool().run(sequences.len() * kv_heads, &|task| {
            let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
            let rows = sequences[sequence].clone();
            self.dispatch(Task { isa: self.isa(), shape, rows, kv_head, qkv, out, d_out, d_qkv: &d_qkv });
        });
    }
}

thread_local! {
    /// Reused from task to task.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Working memory of a task. A head's elements are cut in panels of up to 64.
struct Scratch {
    /// `[key panel][element][64 keys]`.
    keys_across: AlignedBuffer,
    values_across: AlignedBuffer,
    /// `[element panel][key][width]`.
    keys: AlignedBuffer,
    /// `[key panel][query][64 keys]`: scores, then probabilities.
    p: AlignedBuffer,
    /// The same of their gradients.
    ds: AlignedBuffer,
    /// `[key][query]` of one panel.
    turned: AlignedBuffer,
    /// `[query][width]` of one panel of elements.
    queries: AlignedBuffer,
    /// `[element panel][query][width]`.
    dq: AlignedBuffer,
    /// `[element panel][key][width]`.
    dk: AlignedBuffer,
    dv: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Scratch {
        let empty = || AlignedBuffer::zeroed(0);
        Scratch {
            keys_across: empty(),
            values_across: empty(),
            keys: empty(),
            p: empty(),
            ds: empty(),
            turned: empty(),
            queries: empty(),
            dq: empty(),
            dk: empty(),
            dv: empty(),
        }
    }
}

impl Scratch {
    fn reserve(&mut self, count: usize, head_dim: usize) {
        let keys = count.next_multiple_of(PANEL);
        let elements = head_dim.next_multiple_of(LANES);
        let reserve = |buffer: &mut AlignedBuffer, len: usize| {
            if buffer.len() < len {
                *buffer = AlignedBuffer::zeroed(len);
            }
        };
        reserve(&mut self.keys_across, keys * head_dim);
        reserve(&mut self.values_across, keys * head_dim);
        reserve(&mut self.keys, keys * elements);
        reserve(&mut self.p, keys * QUERIES);
        reserve(&mut self.ds, keys * QUERIES);
        reserve(&mut self.turned, PANEL * QUERIES);
        reserve(&mut self.queries, QUERIES * PANEL);
        reserve(&mut self.dq, QUERIES * elements);
        reserve(&mut self.dk, keys * elements);
        reserve(&mut self.dv, keys * elements);
    }
}

/// One sequence, one KV head.
struct Task<'a> {
    isa: Isa,
    shape: &'a AttentionShape,
    rows: Range<usize>,
    kv_head: usize,
    qkv: StridedRows<'a>,
    out: &'a [f32],
    d_out: &'a [f32],
    d_qkv: &'a DisjointMut<'a>,
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
    /// Panels of a head's elements: where each begins, and how wide it is.
    #[inline(always)]
    fn element_panels(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let head_dim = self.shape.layout.head_dim;
        (0..head_dim)
            .step_by(PANEL)
            .map(move |start| (start, PANEL.min((head_dim - start).next_multiple_of(LANES))))
    }

    /// Where the head's keys begin in a row; its values are as far again behind all keys.
    #[inline(always)]
    fn key_at(&self) -> usize {
        (self.shape.q_heads + self.kv_head) * self.shape.layout.head_dim
    }

    #[inline(always)]
    fn value_at(&self) -> usize {
        self.key_at() + self.shape.layout.kv_heads * self.shape.layout.head_dim
    }

    /// One head's elements of a row.
    #[inline(always)]
    fn head(&self, row: usize, at: usize) -> &[f32] {
        &self.qkv.data[row * self.qkv.stride + at..][..self.shape.layout.head_dim]
    }

    #[inline(always)]
    fn run_with<S: Simd16>(&self, scratch: &mut Scratch) {
        let head_dim = self.shape.layout.head_dim;
        let group = self.shape.q_heads / self.shape.layout.kv_heads;
        let (count, padded) = (self.rows.len(), self.rows.len().next_multiple_of(PANEL));
        scratch.reserve(count, head_dim);
        self.spread(scratch);
        let elements = head_dim.next_multiple_of(LANES);
        scratch.dk[..padded * elements].fill(0.0);
        scratch.dv[..padded * elements].fill(0.0);
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for first in (0..count).step_by(QUERIES) {
                self.block::<S>(head, first..count.min(first + QUERIES), scratch);
            }
        }
        for (from, at) in [(&scratch.dk, self.key_at()), (&scratch.dv, self.value_at())] {
            for (start, width) in self.element_panels() {
                for (key, from) in from[start * padded..].chunks_exact(width).take(count).enumerate() {
                    self.write(self.rows.start + key, at + start, &from[..width.min(head_dim - start)]);
                }
            }
        }
    }

    /// Writes some gradients of a row.
    #[inline(always)]
    fn write(&self, row: usize, at: usize, from: &[f32]) {
        let start = row * self.qkv.stride + at;
        // SAFETY: rows belong to one sequence, heads to one task.
        unsafe { self.d_qkv.range(start..start + from.len()) }.copy_from_slice(from);
    }

    /// Lays out keys and values for the products.
    #[inline(always)]
    fn spread(&self, scratch: &mut Scratch) {
        let head_dim = self.shape.layout.head_dim;
        let (count, padded) = (self.rows.len(), self.rows.len().next_multiple_of(PANEL));
        for (to, at) in
            [(&mut scratch.keys_across, self.key_at()), (&mut scratch.values_across, self.value_at())]
        {
            for key in 0..padded {
                let panel = &mut to[key / PANEL * PANEL * head_dim..][..PANEL * head_dim];
                let slots = panel.iter_mut().skip(key % PANEL).step_by(PANEL);
                if key < count {
                    let from = self.head(self.rows.start + key, at);
                    slots.zip(from).for_each(|(to, from)| *to = *from);
                } else {
                    slots.for_each(|to| *to = 0.0);
                }
            }
        }
        for (start, width) in self.element_panels() {
            let panel = scratch.keys[start * padded..].chunks_exact_mut(width).take(padded);
            for (key, to) in panel.enumerate() {
                to.fill(0.0);
                if key < count {
                    let end = head_dim.min(start + width);
                    let from = &self.head(self.rows.start + key, self.key_at())[start..end];
                    to[..end - start].copy_from_slice(from);
                }
            }
        }
    }

    /// The gradients that some queries of one head give.
    #[inline(always)]
    fn block<S: Simd16>(&self, head: usize, queries: Range<usize>, scratch: &mut Scratch) {
        let AttentionShape { q_heads, .. } = *self.shape;
        let head_dim = self.shape.layout.head_dim;
        let (len, padded) = (queries.len(), self.rows.len().next_multiple_of(PANEL));
        let panels = queries.end.div_ceil(PANEL);
        let first_row = self.rows.start + queries.start;
        let out_stride = q_heads * head_dim;
        let out_at = first_row * out_stride + head * head_dim;
        let q_at = first_row * self.qkv.stride + head * head_dim;
        let across = |panel: usize| panel * PANEL * head_dim;
        let block = |panel: usize| panel * PANEL * len;
        for panel in 0..panels {
            let scores = PanelRun {
                rows: len,
                steps: head_dim,
                x: self.qkv.data[q_at..(q_at + (len - 1) * self.qkv.stride + head_dim)].as_ptr(),
                x_stride: self.qkv.stride,
                weights: scratch.keys_across[across(panel)..across(panel + 1)].as_ptr(),
                width: PANEL,
                sums: scratch.p[block(panel)..block(panel + 1)].as_mut_ptr(),
                resume: false,
            };
            let probabilities = PanelRun {
                x: self.d_out[out_at..(out_at + (len - 1) * out_stride + head_dim)].as_ptr(),
                x_stride: out_stride,
                weights: scratch.values_across[across(panel)..across(panel + 1)].as_ptr(),
                sums: scratch.ds[block(panel)..block(panel + 1)].as_mut_ptr(),
                ..scores
            };
            // SAFETY: every extent was sliced.
            unsafe {
                scores.run(self.isa);
                probabilities.run(self.isa);
            }
        }
        for index in 0..len {
            let at = out_at + index * out_stride;
            let (out, d_out) = (&self.out[at..at + head_dim], &self.d_out[at..at + head_dim]);
            self.softmax::<S>(queries.start + index, index, len, panels, dot::<S>(out, d_out), scratch);
        }
        for (start, width) in self.element_panels() {
            for panel in 0..panels {
                let dq = PanelRun {
                    rows: len,
                    steps: PANEL,
                    x: scratch.ds[block(panel)..block(panel + 1)].as_ptr(),
                    x_stride: PANEL,
                    weights: scratch.keys[start * padded + panel * PANEL * width..][..PANEL * width].as_ptr(),
                    width,
                    sums: scratch.dq[..len * width].as_mut_ptr(),
                    resume: panel > 0,
                };
                // SAFETY: every extent was sliced.
                unsafe { dq.run(self.isa) };
            }
            let live = width.min(head_dim - start);
            for index in 0..len {
                let from = &scratch.dq[index * width..][..live];
                self.write(first_row + index, head * head_dim + start, from);
            }
        }
        // Keys and values take p and dS across: `[key][query]`.
        for panel in 0..panels {
            let keys = panel * PANEL..(panel + 1) * PANEL;
            for (keyed, from, source) in [
                (
                    &mut scratch.dv,
                    &scratch.p,
                    StridedRows { data: &self.d_out[out_at..], stride: out_stride },
                ),
                (
                    &mut scratch.dk,
                    &scratch.ds,
                    StridedRows { data: &self.qkv.data[q_at..], stride: self.qkv.stride },
                ),
            ] {
                let from = &from[block(panel)..block(panel + 1)];
                for (key, to) in scratch.turned.chunks_exact_mut(len).take(PANEL).enumerate() {
                    for (query, to) in to.iter_mut().enumerate() {
                        *to = from[query * PANEL + key];
                    }
                }
                for (start, width) in self.element_panels() {
                    let live = width.min(head_dim - start);
                    for (query, to) in scratch.queries.chunks_exact_mut(width).take(len).enumerate() {
                        to[..live].copy_from_slice(&source.row(query, head_dim)[start..start + live]);
                        to[live..].fill(0.0);
                    }
                    let at = start * padded + keys.start * width;
                    let run = PanelRun {
                        rows: PANEL,
                        steps: len,
                        x: scratch.turned[..PANEL * len].as_ptr(),
                        x_stride: len,
                        weights: scratch.queries[..len * width].as_ptr(),
                        width,
                        sums: keyed[at..at + PANEL * width].as_mut_ptr(),
                        resume: true,
                    };
                    // SAFETY: every extent was sliced; the sums began as zeros.
                    unsafe { run.run(self.isa) };
                }
            }
        }
    }

    /// Scores and gradients of probabilities of one query become probabilities and gradients of scores.
    #[inline(always)]
    fn softmax<S: Simd16>(
        &self,
        query: usize,
        index: usize,
        len: usize,
        panels: usize,
        dot: f32,
        scratch: &mut Scratch,
    ) {
        let start = self.shape.window.map_or(0, |window| (query + 1).saturating_sub(window.max(1) as usize));
        let keys = start..query + 1;
        let at = |panel: usize| panel * PANEL * len + index * PANEL;
        let lowest = S::splat(f32::NEG_INFINITY);
        let mut max = lowest;
        for panel in 0..panels {
            let scores = &mut scratch.p[at(panel)..][..PANEL];
            let first = panel * PANEL;
            for vector in scores.chunks_exact_mut(LANES) {
                S::read(vector).mul(S::splat(self.shape.scale)).write(vector);
            }
            let (low, high) = (keys.start.clamp(first, first + PANEL), keys.end.clamp(first, first + PANEL));
            scores[..low - first].fill(f32::NEG_INFINITY);
            scores[high - first..].fill(f32::NEG_INFINITY);
            for vector in scores.chunks_exact(LANES) {
                max = S::read(vector).max(max);
            }
        }
        let max = S::splat(max.max_lane());
        let mut sum = S::splat(0.0);
        for panel in 0..panels {
            for vector in scratch.p[at(panel)..][..PANEL].chunks_exact_mut(LANES) {
                let p = math::exp_lanes_nonpositive(S::read(vector).sub(max));
                p.write(vector);
                sum = sum.add(p);
            }
        }
        let sum = S::splat(sum.sum_lanes());
        for panel in 0..panels {
            let p = scratch.p[at(panel)..][..PANEL].chunks_exact_mut(LANES);
            for (p, ds) in p.zip(scratch.ds[at(panel)..][..PANEL].chunks_exact_mut(LANES)) {
                let share = S::read(p).div(sum);
                share.write(p);
                let slope = S::read(ds).sub(S::splat(dot)).mul(S::splat(self.shape.scale));
                share.mul(slope).write(ds);
            }
        }
    }
}

/// Σ a·b in sixteen accumulators and a fixed tree.
#[inline(always)]
fn dot<S: Simd16>(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = S::splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sum = S::read_tail(a, 0.0).mul_add(S::read_tail(b, 0.0), sum);
    }
    sum.sum_lanes()
}
