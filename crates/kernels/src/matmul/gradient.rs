//! The two products of the backward pass: gradients of a layer's inputs, and of its weights.
//!
//! For y = x·Wᵀ they are dx = dy·W and dW = dyᵀ·x. Lanes hold what becomes the result's columns, as everywhere: sixteen
//! inputs. Packed weights are widened and turned sixteen outputs × 64 inputs at a time into memory that stays in the L2
//! cache while all rows pass; a second copy of a matrix never exists.

use super::packed::{PANEL, PackedMatrix};
use super::panel::merge;
use super::run::PanelRun;
use super::widen::Sixteen;
use crate::Isa;
use crate::aligned::AlignedBuffer;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::{DisjointMut, StridedRows};
use std::cell::Cell;
use std::ops::Range;

/// Outputs that are widened together: 256 KiB for 64 inputs.
const CHUNK: usize = 1024;
/// Rows of one task: enough that widening the weights is a small part.
const TASK_ROWS: usize = 512;
/// Outputs of one task of a weight gradient.
const TASK_OUTPUTS: usize = 96;
/// Open sums of the streaming tree: of 8 parts at most 3 wait while a fourth is computed.
const DEPTH: usize = 4;

thread_local! {
    /// Reused from task to task.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Working memory of a task.
struct Scratch {
    panel: AlignedBuffer,
    sums: AlignedBuffer,
    sixteen: Sixteen,
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch { panel: AlignedBuffer::zeroed(0), sums: AlignedBuffer::zeroed(0), sixteen: Sixteen::ZERO }
    }
}

impl Scratch {
    fn reserve(&mut self, panel: usize, sums: usize) {
        for (buffer, len) in [(&mut self.panel, panel), (&mut self.sums, sums)] {
            if buffer.len() < len {
                *buffer = AlignedBuffer::zeroed(len);
            }
        }
    }
}

impl Kernels {
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
        let (n, k) = (weights.n(), weights.k());
        assert!(rows == 0 || dy.data.len() >= (rows - 1) * dy.stride + n, "dy has rows of n");
        assert_eq!(dx.len(), rows * k, "dx is rows × k");
        assert_parts_name(parts, n);
        let panels = k.div_ceil(PANEL);
        let row_blocks = rows.div_ceil(TASK_ROWS);
        let dx = DisjointMut::new(dx);
        self.pool().run(panels * row_blocks, &|task| {
            let (panel, block) = (task / row_blocks, task % row_blocks);
            let rows = block * rows / row_blocks..(block + 1) * rows / row_blocks;
            let columns = panel * PANEL..k.min((panel + 1) * PANEL);
            self.dispatch(InputGradient { isa: self.isa(), dy, weights, parts, rows, columns, dx: &dx });
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
        if rows == 0 || n == 0 || k == 0 {
            return;
        }
        // `[output][row]`, once for all tasks.
        let mut turned = self.scratch(rows * n);
        let turned = &mut turned[..rows * n];
        {
            let turned = DisjointMut::new(turned);
            self.for_ranges(n, 8, |outputs| {
                // SAFETY: the ranges of different tasks are disjoint.
                let to = unsafe { turned.range(outputs.start * rows..outputs.end * rows) };
                for row in 0..rows {
                    let from = &dy.row(row, n)[outputs.clone()];
                    for (index, &from) in from.iter().enumerate() {
                        to[index * rows + row] = from.to_bits();
                    }
                }
            });
        }
        let turned = &*turned;
        let (panels, blocks) = (k.div_ceil(PANEL), n.div_ceil(TASK_OUTPUTS));
        let gradient = DisjointMut::new(gradient);
        self.pool().run(panels * blocks, &|task| {
            let (panel, block) = (task / blocks, task % blocks);
            let outputs = block * n / blocks..(block + 1) * n / blocks;
            let columns = panel * PANEL..k.min((panel + 1) * PANEL);
            self.dispatch(WeightGradient {
                isa: self.isa(),
                rows,
                turned,
                x,
                k,
                outputs,
                columns,
                gradient: &gradient,
            });
        });
    }
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

/// Some rows of up to 64 inputs' gradients.
struct InputGradient<'a> {
    isa: Isa,
    dy: StridedRows<'a>,
    weights: &'a PackedMatrix,
    parts: &'a [Vec<Range<usize>>],
    rows: Range<usize>,
    columns: Range<usize>,
    dx: &'a DisjointMut<'a>,
}

impl LaneKernel for InputGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let mut scratch = SCRATCH.take().unwrap_or_default();
        self.run_with::<S>(&mut scratch);
        SCRATCH.set(Some(scratch));
    }
}

impl InputGradient<'_> {
    #[inline(always)]
    fn run_with<S: Simd16>(self, scratch: &mut Scratch) {
        let width = self.columns.len().next_multiple_of(LANES);
        let size = self.rows.len() * width;
        scratch.reserve(CHUNK * PANEL, DEPTH * size);
        // A binary counter: after part i, as many pairs close as i + 1 has trailing zeros.
        let (mut filled, mut depth) = ([false; DEPTH], 0);
        for (index, ranges) in self.parts.iter().enumerate() {
            filled[depth] = self.chain::<S>(ranges, width, depth * size, scratch);
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
        let k = self.weights.k();
        for (index, row) in self.rows.clone().enumerate() {
            // SAFETY: rows and columns of different tasks are disjoint.
            let out = unsafe { self.dx.range(row * k + self.columns.start..row * k + self.columns.end) };
            if filled[0] {
                out.copy_from_slice(&scratch.sums[index * width..][..out.len()]);
            } else {
                out.fill(-0.0);
            }
        }
    }

    /// One part's chains, into the sums at `at`; whether it has any output.
    #[inline(always)]
    fn chain<S: Simd16>(
        &self,
        ranges: &[Range<usize>],
        width: usize,
        at: usize,
        scratch: &mut Scratch,
    ) -> bool {
        let rows = self.rows.len();
        let mut resume = false;
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start + CHUNK);
                let Scratch { panel, sums, sixteen } = scratch;
                self.weights.widen::<S>(start..end, self.columns.clone(), width, sixteen, panel);
                let run = PanelRun {
                    rows,
                    steps: end - start,
                    x: self.dy.data[self.rows.start * self.dy.stride + start..].as_ptr(),
                    x_stride: self.dy.stride,
                    weights: panel.as_ptr(),
                    width,
                    sums: sums[at..at + rows * width].as_mut_ptr(),
                    resume,
                };
                // SAFETY: `dy` has `n` columns in every row, the panel holds the widened chunk, the sums were sliced; they
                // are initialised from the first chunk on.
                unsafe { run.run(self.isa) };
                (resume, start) = (true, end);
            }
        }
        resume
    }
}

/// Up to 64 columns of some outputs' gradients.
struct WeightGradient<'a> {
    isa: Isa,
    rows: usize,
    /// `[output][row]`, bits of floats.
    turned: &'a [u32],
    x: StridedRows<'a>,
    k: usize,
    outputs: Range<usize>,
    columns: Range<usize>,
    gradient: &'a DisjointMut<'a>,
}

impl LaneKernel for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let mut scratch = SCRATCH.take().unwrap_or_default();
        let width = self.columns.len().next_multiple_of(LANES);
        let outputs = self.outputs.len();
        scratch.reserve(self.rows * width, outputs * width);
        let Scratch { panel, sums, .. } = &mut *scratch;
        for (row, to) in panel.chunks_exact_mut(width).take(self.rows).enumerate() {
            let (to, padding) = to.split_at_mut(self.columns.len());
            to.copy_from_slice(&self.x.row(row, self.k)[self.columns.clone()]);
            padding.fill(0.0);
        }
        // SAFETY (of `range`, twice): outputs and columns of different tasks are disjoint.
        let gradient = |output: usize| unsafe {
            let start = output * self.k;
            self.gradient.range(start + self.columns.start..start + self.columns.end)
        };
        for (sums, output) in sums.chunks_exact_mut(width).zip(self.outputs.clone()) {
            let (sums, padding) = sums.split_at_mut(self.columns.len());
            sums.copy_from_slice(gradient(output));
            padding.fill(0.0);
        }
        let run = PanelRun {
            rows: outputs,
            steps: self.rows,
            x: self.turned[self.outputs.start * self.rows..self.outputs.end * self.rows].as_ptr().cast(),
            x_stride: self.rows,
            weights: panel.as_ptr(),
            width,
            sums: sums.as_mut_ptr(),
            resume: true,
        };
        // SAFETY: all extents were sliced or reserved above.
        unsafe { run.run(self.isa) };
        for (sums, output) in sums.chunks_exact(width).zip(self.outputs.clone()) {
            gradient(output).copy_from_slice(&sums[..self.columns.len()]);
        }
        SCRATCH.set(Some(scratch));
    }
}
