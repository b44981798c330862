//! The two products of the backward pass: gradients of a layer's inputs, and of its weights.
//!
//! For y = x·Wᵀ they are dx = dy·W and dW = dyᵀ·x. A sum's terms are never in lanes, as everywhere; what the lanes do hold is
//! free, and chosen so that the smaller of two matrices is the one to be turned around. For dx that is rows: packed weights
//! are widened as they lie, 128 outputs × 512 inputs at a time into memory that stays in the L2 cache while all rows of a task
//! pass, 64 of them in lanes. A second copy of a matrix never exists.

use super::packed::{PANEL, PackedMatrix};
use super::panel::merge;
use super::run::PanelRun;
use crate::Isa;
use crate::aligned::AlignedBuffer;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::{DisjointMut, StridedRows};
use crate::transpose::{Place, transpose};
use ashlar_vocabulary::GradientMemory;
use ashlar_vocabulary::gradient::{
    CHUNK_OUTPUTS as CHUNK, CHUNK_STRIDE as STRIDE, TASK_INPUTS, TASK_ROWS, TREE_DEPTH as DEPTH, WEIGHT_ROWS,
};
use std::cell::Cell;
use std::ops::Range;

/// Fewest inputs of a task where there are more, to have work for all threads.
const TASK_INPUTS_MIN: usize = 2 * PANEL;
/// Tasks per thread where the product is large enough.
const TASKS_PER_THREAD: usize = 4;
/// Half a page, in elements: of sixteen rows that lie a multiple of it apart, eight or more share a set.
const ROWS_EVICT: usize = 512;
/// Most rows of sums of one task of a weight gradient.
const WEIGHT_SUMS: usize = 96;

thread_local! {
    /// Reused from task to task.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Working memory of a task.
struct Scratch {
    /// Widened weights, `[input][output]`.
    weights: AlignedBuffer,
    /// What the lanes hold, panel by panel: `[step][up to 64]`.
    turned: AlignedBuffer,
    /// `[level of the tree][panel of lanes][row of sums][up to 64]`.
    sums: AlignedBuffer,
    /// Sixteen rows on their way: read in long runs, as rows that lie a power of two apart evict one another.
    rows: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Scratch {
        let empty = || AlignedBuffer::zeroed(0);
        Scratch {
            weights: empty(),
            turned: empty(),
            sums: empty(),
            rows: AlignedBuffer::zeroed(LANES * STRIDE),
        }
    }
}

impl Scratch {
    fn reserve(&mut self, weights: usize, turned: usize, sums: usize) {
        for (buffer, len) in
            [(&mut self.weights, weights), (&mut self.turned, turned), (&mut self.sums, sums)]
        {
            if buffer.len() < len {
                *buffer = AlignedBuffer::zeroed(len);
            }
        }
    }
}

impl Kernels {
    /// Memory that the threads take for gradients of products beyond their operands, in bytes: at most. One side of a weight
    /// gradient is turned around in the memory of activations ([`Kernels::scratch_bytes`]).
    pub fn gradient_bytes(&self) -> usize {
        GradientMemory { threads: self.threads() }.products_bytes()
    }

    /// dx = dy·W, the gradient of y = x·Wᵀ by x. Of quantised weights it is that of the numbers that they stand for; the
    /// rounding of activations counts as the identity.
    ///
    /// - `dy`: rows that begin with n gradients of outputs, `dx`: rows × k.
    /// - `parts`: 1, 2, 4 or 8 parts of the outputs; each is a list of ranges, one ascending chain of fused multiply-adds
    ///   over all of them in this order (a fused product's part is a range of each of its matrices). Parts combine in the
    ///   tree of [`Kernels::matmul`]; one without outputs counts as −0.
    ///
    /// # Panics
    /// If a length does not fit, or the ranges do not name every output once.
    pub fn input_gradient(
        &self,
        rows: usize,
        dy: StridedRows<'_>,
        weights: &PackedMatrix,
        parts: &[Vec<Range<usize>>],
        dx: &mut [f32],
    ) {
        self.input_gradient_to::<false>(rows, dy, weights, parts, dx);
    }

    /// dx ← dx + dy·W: [`Kernels::input_gradient`], its result added by one rounded addition.
    ///
    /// # Panics
    /// If a length does not fit, or the ranges do not name every output once.
    pub fn add_input_gradient(
        &self,
        rows: usize,
        dy: StridedRows<'_>,
        weights: &PackedMatrix,
        parts: &[Vec<Range<usize>>],
        dx: &mut [f32],
    ) {
        self.input_gradient_to::<true>(rows, dy, weights, parts, dx);
    }

    fn input_gradient_to<const ADD: bool>(
        &self,
        rows: usize,
        dy: StridedRows<'_>,
        weights: &PackedMatrix,
        parts: &[Vec<Range<usize>>],
        dx: &mut [f32],
    ) {
        let (n, k) = (weights.n(), weights.k());
        assert!(rows == 0 || dy.data.len() >= (rows - 1) * dy.stride + n, "dy has rows of n");
        assert_eq!(dx.len(), rows * k, "dx is rows × k");
        assert_parts_name(parts, n);
        let (row_panels, panels) = (rows.div_ceil(PANEL), k.div_ceil(PANEL));
        let (row_blocks, blocks) = tasks(rows, k, self.threads());
        let dx = DisjointMut::new(dx);
        self.pool().run(row_blocks * blocks, &|task| {
            let (row_block, block) = (task / blocks, task % blocks);
            let cut = |index: usize, panels: usize, of: usize, end: usize| {
                index * panels / of * PANEL..end.min((index + 1) * panels / of * PANEL)
            };
            let rows = cut(row_block, row_panels, row_blocks, rows);
            let columns = cut(block, panels, blocks, k);
            self.dispatch(InputGradient::<ADD> {
                isa: self.isa(),
                dy,
                weights,
                parts,
                rows,
                columns,
                dx: &dx,
            });
        });
    }

    /// gradient ← gradient + dyᵀ·x, the gradient of y = x·Wᵀ by W: per element one chain of fused multiply-adds that goes on
    /// from what is there, over the `rows` in ascending order. Rows cut into several calls give the same bits.
    ///
    /// Row r of `dy` begins with `n` gradients of outputs, row r of `x` with `k` inputs; `gradient` is n × k.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn weight_gradient(
        &self,
        rows: usize,
        (dy, n): (StridedRows<'_>, usize),
        (x, k): (StridedRows<'_>, usize),
        gradient: &mut [f32],
    ) {
        assert_eq!(gradient.len(), n * k, "the gradient is n × k");
        if n == 0 || k == 0 {
            return;
        }
        // Lanes hold the longer side; the other one is turned around.
        if n > k {
            self.weight_gradient_of::<true>(rows, (x, k), (dy, n), k, gradient);
        } else {
            self.weight_gradient_of::<false>(rows, (dy, n), (x, k), k, gradient);
        }
    }

    /// Of the gradient, whose rows are `stride` long, `narrow` gives the rows and `wide` the columns, or, where `SWAPPED`, the
    /// other way around.
    fn weight_gradient_of<const SWAPPED: bool>(
        &self,
        rows: usize,
        (narrow, narrow_width): (StridedRows<'_>, usize),
        (wide, wide_width): (StridedRows<'_>, usize),
        stride: usize,
        gradient: &mut [f32],
    ) {
        let mut turned = self.scratch(GradientMemory::turned_words(rows, (narrow_width, wide_width)));
        let gradient = DisjointMut::new(gradient);
        for first in (0..rows).step_by(WEIGHT_ROWS) {
            let count = WEIGHT_ROWS.min(rows - first);
            // `[narrow][row]`, once for all tasks.
            let turned = &mut turned[..count * narrow_width];
            {
                let turned = DisjointMut::new(turned);
                self.for_ranges(narrow_width, LANES, |columns| {
                    self.dispatch(TurnNarrow {
                        rows: first..first + count,
                        narrow,
                        columns,
                        turned: &turned,
                    });
                });
            }
            let turned = &*turned;
            let (panels, blocks) = (wide_width.div_ceil(PANEL), narrow_width.div_ceil(WEIGHT_SUMS));
            self.pool().run(panels * blocks, &|task| {
                let (panel, block) = (task / blocks, task % blocks);
                self.dispatch(WeightGradient::<SWAPPED> {
                    isa: self.isa(),
                    rows: first..first + count,
                    turned,
                    sums: block * narrow_width / blocks..(block + 1) * narrow_width / blocks,
                    wide,
                    wide_width,
                    lanes: panel * PANEL..wide_width.min((panel + 1) * PANEL),
                    stride,
                    gradient: &gradient,
                });
            });
        }
    }
}

/// Whether sixteen rows so far apart fall on so few sets of a first-level cache that they evict one another while they are read
/// side by side.
#[inline(always)]
fn evicts(stride: usize) -> bool {
    stride.is_multiple_of(ROWS_EVICT)
}

/// Blocks of rows and of inputs, one task for each pair: as large as the caches allow, but enough of them for all threads.
fn tasks(rows: usize, k: usize, threads: usize) -> (usize, usize) {
    let row_blocks = rows.div_ceil(TASK_ROWS);
    if threads == 1 {
        return (row_blocks, k.div_ceil(TASK_INPUTS));
    }
    let wanted = TASKS_PER_THREAD * threads;
    let mut inputs = TASK_INPUTS;
    while inputs > TASK_INPUTS_MIN && row_blocks * k.div_ceil(inputs) < wanted {
        inputs /= 2;
    }
    let blocks = k.div_ceil(inputs);
    (row_blocks.max(rows.div_ceil(PANEL).min(wanted / blocks.max(1))), blocks)
}

/// Checks that the ranges of all parts name each of `0..n` once.
fn assert_parts_name(parts: &[Vec<Range<usize>>], n: usize) {
    assert!(matches!(parts.len(), 1 | 2 | 4 | 8), "an axis has 1, 2, 4 or 8 parts here, not {}", parts.len());
    let mut ranges: Vec<&Range<usize>> = parts.iter().flatten().filter(|range| !range.is_empty()).collect();
    ranges.sort_by_key(|range| range.start);
    let mut next = 0;
    for range in ranges {
        assert_eq!(range.start, next, "the parts name every output once");
        next = range.end;
    }
    assert_eq!(next, n, "the parts name all outputs");
}

/// The gradients of some rows by some inputs.
struct InputGradient<'a, const ADD: bool> {
    isa: Isa,
    dy: StridedRows<'a>,
    weights: &'a PackedMatrix,
    parts: &'a [Vec<Range<usize>>],
    rows: Range<usize>,
    columns: Range<usize>,
    dx: &'a DisjointMut<'a>,
}

impl<const ADD: bool> LaneKernel for InputGradient<'_, ADD> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let mut scratch = SCRATCH.take().unwrap_or_default();
        self.run_with::<S>(&mut scratch);
        SCRATCH.set(Some(scratch));
    }
}

/// A panel of up to 64 rows of a task.
struct RowPanel {
    /// Its first row, among the task's.
    first: usize,
    /// Rows that exist.
    rows: usize,
    /// Lanes: a multiple of sixteen.
    width: usize,
}

impl<const ADD: bool> InputGradient<'_, ADD> {
    #[inline(always)]
    fn panels(&self) -> usize {
        self.rows.len().div_ceil(PANEL)
    }

    #[inline(always)]
    fn panel(&self, index: usize) -> RowPanel {
        let first = index * PANEL;
        let rows = PANEL.min(self.rows.len() - first);
        RowPanel { first, rows, width: rows.next_multiple_of(LANES) }
    }

    #[inline(always)]
    fn run_with<S: Simd16>(self, scratch: &mut Scratch) {
        let lanes = self.rows.len().next_multiple_of(LANES);
        let size = self.columns.len() * lanes;
        // Of 2ⁿ parts n + 1 sums are open at most.
        let levels = self.parts.len().ilog2() as usize + 1;
        scratch.reserve(self.columns.len() * STRIDE, CHUNK * lanes, levels * size);
        // A binary counter: after part i, as many pairs close as i + 1 has trailing zeros.
        let (mut filled, mut depth) = ([false; DEPTH], 0);
        for (index, ranges) in self.parts.iter().enumerate() {
            filled[depth] = self.chain::<S>(ranges, depth * size, scratch);
            depth += 1;
            let mut closed = index + 1;
            while closed % 2 == 0 {
                depth -= 1;
                if filled[depth] {
                    let (left, right) = scratch.sums.split_at_mut(depth * size);
                    let left = &mut left[(depth - 1) * size..];
                    // SAFETY: both have `size` elements; the right one was computed, the left one if it is read.
                    unsafe {
                        merge::<S>(left.as_mut_ptr(), right.as_ptr(), size, filled[depth - 1]);
                    }
                    filled[depth - 1] = true;
                }
                closed /= 2;
            }
        }
        self.finish::<S>(filled[0], &scratch.sums);
    }

    /// Writes the sums where they belong; of no outputs they are −0, which added changes nothing.
    #[inline(always)]
    fn finish<S: Simd16>(&self, filled: bool, sums: &[f32]) {
        let (k, inputs) = (self.weights.k(), self.columns.len());
        for index in 0..self.panels() {
            let RowPanel { first, rows, width } = self.panel(index);
            let sums = &sums[first * inputs..][..width * inputs];
            let start = (self.rows.start + first) * k + self.columns.start;
            if filled {
                let end = start + (rows - 1) * k + inputs;
                let from = Place { data: sums.as_ptr(), stride: width };
                let to = Place { data: self.dx.shared(start..end), stride: k };
                // SAFETY: the sums have `width` lanes for each input, the rows lie `k` apart; rows and columns of different
                // tasks are disjoint.
                unsafe { transpose::<S, ADD>(from, inputs, rows, to) };
            } else if !ADD {
                for start in (0..rows).map(|row| start + row * k) {
                    // SAFETY: as above.
                    unsafe { self.dx.range(start..start + inputs) }.fill(-0.0);
                }
            }
        }
    }

    /// One part's chains, into the sums at `at`; whether it has any output.
    #[inline(always)]
    fn chain<S: Simd16>(&self, ranges: &[Range<usize>], at: usize, scratch: &mut Scratch) -> bool {
        let inputs = self.columns.len();
        let mut resume = false;
        for range in ranges {
            for segment in self.weights.segments() {
                let mut start = range.start.max(segment.first);
                let last = range.end.min(segment.first + segment.n);
                while start < last {
                    let first = (start - segment.first) / LANES * LANES;
                    let end = last.min(segment.first + first + CHUNK);
                    let sixteens = (end - segment.first - first).div_ceil(LANES);
                    segment.widen::<S>(first, sixteens, self.columns.clone(), &mut scratch.weights, STRIDE);
                    self.turn::<S>(start..end, scratch);
                    for index in 0..self.panels() {
                        let panel = self.panel(index);
                        let sums = at + panel.first * inputs;
                        let run = PanelRun {
                            rows: inputs,
                            steps: end - start,
                            x: scratch.weights[start - segment.first - first..].as_ptr(),
                            x_stride: STRIDE,
                            weights: scratch.turned[panel.first * CHUNK..][..panel.width * CHUNK].as_ptr(),
                            width: panel.width,
                            sums: scratch.sums[sums..sums + panel.width * inputs].as_mut_ptr(),
                            resume,
                        };
                        // SAFETY: the weights have `STRIDE` steps for each input, of which `end - start` from the first
                        // wanted one on were widened; so many steps of the panel were turned, the sums were sliced; they
                        // are initialised from the first chunk on.
                        unsafe { run.run(self.isa) };
                    }
                    (resume, start) = (true, end);
                }
            }
        }
        resume
    }

    /// Turns the task's gradients by some outputs around: per panel of rows `[output][row]`.
    #[inline(always)]
    fn turn<S: Simd16>(&self, outputs: Range<usize>, scratch: &mut Scratch) {
        let Scratch { turned, rows: sixteen, .. } = scratch;
        for index in 0..self.panels() {
            let panel = self.panel(index);
            let turned = &mut turned[panel.first * CHUNK..][..panel.width * CHUNK];
            for begin in (0..panel.rows).step_by(LANES) {
                let count = LANES.min(panel.rows - begin);
                let first = (self.rows.start + panel.first + begin) * self.dy.stride + outputs.start;
                let sixteen_rows = &self.dy.data[first..];
                let from = if count == LANES && !evicts(self.dy.stride) {
                    assert!(
                        sixteen_rows.len() >= (LANES - 1) * self.dy.stride + outputs.len(),
                        "dy has rows of n"
                    );
                    Place { data: sixteen_rows.as_ptr(), stride: self.dy.stride }
                } else {
                    for (row, to) in sixteen.chunks_exact_mut(STRIDE).take(count).enumerate() {
                        let from = &sixteen_rows[row * self.dy.stride..][..outputs.len()];
                        to[..from.len()].copy_from_slice(from);
                    }
                    Place { data: sixteen.as_ptr(), stride: STRIDE }
                };
                let to = Place { data: turned[begin..].as_mut_ptr(), stride: panel.width };
                // All sixteen, whatever those hold that do not exist: nobody reads their lanes.
                // SAFETY: there are sixteen rows, in place as was checked or in the buffer; the panel has `width` lanes for each of
                // `CHUNK` steps.
                unsafe { transpose::<S, false>(from, LANES, outputs.len(), to) };
            }
        }
    }
}

/// Turns some columns of the narrow side of a weight gradient around.
struct TurnNarrow<'a> {
    rows: Range<usize>,
    narrow: StridedRows<'a>,
    columns: Range<usize>,
    /// `[column][row]`, bits of floats.
    turned: &'a DisjointMut<'a, u32>,
}

impl LaneKernel for TurnNarrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let (count, columns) = (self.rows.len(), self.columns.len());
        if count == 0 || columns == 0 {
            return;
        }
        let from = &self.narrow.data[self.rows.start * self.narrow.stride + self.columns.start..];
        assert!(from.len() >= (count - 1) * self.narrow.stride + columns, "the narrow side has its rows");
        let from = Place { data: from.as_ptr(), stride: self.narrow.stride };
        let to = self.turned.shared(self.columns.start * count..self.columns.end * count).cast();
        // SAFETY: `from` was checked to have these rows; the columns of different tasks are disjoint, and so is what they write.
        unsafe { transpose::<S, false>(from, count, columns, Place { data: to, stride: count }) };
    }
}

/// A few rows of sums × up to 64 lanes of a weight gradient.
struct WeightGradient<'a, const SWAPPED: bool> {
    isa: Isa,
    rows: Range<usize>,
    /// The narrow side, `[column][row]`, bits of floats.
    turned: &'a [u32],
    /// Its columns that this task takes.
    sums: Range<usize>,
    wide: StridedRows<'a>,
    wide_width: usize,
    lanes: Range<usize>,
    /// Distance between the gradient's rows.
    stride: usize,
    gradient: &'a DisjointMut<'a>,
}

impl<const SWAPPED: bool> LaneKernel for WeightGradient<'_, SWAPPED> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let mut scratch = SCRATCH.take().unwrap_or_default();
        let (rows, count, lanes) = (self.rows.len(), self.sums.len(), self.lanes.len());
        let width = lanes.next_multiple_of(LANES);
        scratch.reserve(0, rows * width, count * width);
        let Scratch { turned: panel, sums, .. } = &mut *scratch;
        for (row, to) in self.rows.clone().zip(panel.chunks_exact_mut(width)) {
            to[..lanes].copy_from_slice(&self.wide.row(row, self.wide_width)[self.lanes.clone()]);
        }
        // The task's part of the gradient: its first element, and what lies behind its last one.
        let (first, last) = if SWAPPED {
            let at = |lane: usize, sum: usize| lane * self.stride + sum;
            (at(self.lanes.start, self.sums.start), at(self.lanes.end - 1, self.sums.end))
        } else {
            let at = |sum: usize, lane: usize| sum * self.stride + lane;
            (at(self.sums.start, self.lanes.start), at(self.sums.end - 1, self.lanes.end))
        };
        let gradient = self.gradient.shared(first..last);
        let sums = sums[..count * width].as_mut_ptr();
        // SAFETY: the part of the gradient was checked, and no other task has any of it; sums have `count` × `width`.
        unsafe {
            if SWAPPED {
                let from = Place { data: gradient.cast_const(), stride: self.stride };
                transpose::<S, false>(from, lanes, count, Place { data: sums, stride: width });
            } else {
                for row in 0..count {
                    let from = gradient.add(row * self.stride).cast_const();
                    sums.add(row * width).copy_from_nonoverlapping(from, lanes);
                }
            }
        }
        let run = PanelRun {
            rows: count,
            steps: rows,
            x: self.turned[self.sums.start * rows..self.sums.end * rows].as_ptr().cast(),
            x_stride: rows,
            weights: panel.as_ptr(),
            width,
            sums,
            resume: true,
        };
        // SAFETY: all extents were sliced or reserved above. Lanes beyond the gradient hold what was there before.
        unsafe { run.run(self.isa) };
        // SAFETY: as above.
        unsafe {
            if SWAPPED {
                let from = Place { data: sums.cast_const(), stride: width };
                transpose::<S, false>(from, count, lanes, Place { data: gradient, stride: self.stride });
            } else {
                for row in 0..count {
                    gradient.add(row * self.stride).copy_from_nonoverlapping(sums.add(row * width), lanes);
                }
            }
        }
        SCRATCH.set(Some(scratch));
    }
}
