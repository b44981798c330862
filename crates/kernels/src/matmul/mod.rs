//! Products of activations with packed weights: y = x·Wᵀ + bias.
//!
//! Per output element: one ascending chain of fused multiply-adds per part of K, starting at +0, then the tree over the
//! parts, then the bias. Blocking over K keeps the chain by storing and reloading its running value, which is exact, so
//! that tile shapes, batch sizes and threads cannot show in the result.

mod activations;
mod blocks;
mod dense;
mod file_blocks;
mod file_floats;
mod file_rows;
mod float;
mod formats;
mod gradient;
mod input;
mod integer;
mod packed;
mod panel;
mod run;
mod stored;
mod tile;
mod widen;

pub use ashlar_vocabulary::blocks::{BlockAxis, Piece};
pub use blocks::{BlockScale, QuantizedRow};
pub use file_rows::{FileRows, ReadRows};
pub use input::Input;
pub use packed::PackedMatrix;
pub(crate) use run::PanelRun;
pub use stored::{PACKED_VERSION, SegmentLayout, StoredSegment};

use crate::kernels::Kernels;
use crate::lanes::LANES;
use crate::strided::DisjointMut;
use ashlar_vocabulary::WeightType;
use dense::{Dense, DenseMatrix};
use float::FloatChain;
use formats::with_format;
use input::{Form, Ready, RowBlocks, SEGMENTS};
use integer::IntegerChain;
use packed::{PANEL, Panel, Segment, Store};
use panel::{Chain, Epilogue, PanelKernel, PanelProduct, ROW_BLOCK, Target};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Tasks per thread, so that dynamic picking levels out threads of unequal speed.
const TASKS_PER_THREAD: usize = 12;

/// A product, apart from its activations and results.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// Rows of activations.
    pub rows: usize,
    /// The weights, `[n outputs, k inputs]`.
    pub weights: &'a PackedMatrix,
    /// 1, 2, 4 or 8 consecutive ranges that tile `0..k`; they may be empty. Each part is one ascending chain; parts combine
    /// as `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))`, the bias comes last.
    pub k_parts: &'a [Range<usize>],
    /// n elements.
    pub bias: Option<&'a [f32]>,
}

/// What becomes of a product's results, while they are in the core's cache.
#[derive(Debug)]
pub enum Output<'a> {
    /// y = result: rows × n.
    Write(&'a mut [f32]),
    /// y ← y + result, one rounded addition: rows that begin with n elements.
    Add {
        /// What is added to.
        y: &'a mut [f32],
        /// Distance between its rows.
        stride: usize,
    },
    /// The outputs are gates, then as many ups: out = silu(gate)·up, as [`Kernels::silu_mul`] computes it.
    SiluMul {
        /// Rows × n/2.
        out: &'a mut [f32],
        /// Room for rows × n, used where panels do not fall in with the two halves.
        room: &'a mut [f32],
    },
}

impl Kernels {
    /// y = x·Wᵀ + bias for `rows` rows of activations: [`Kernels::product`] of rows as they are.
    ///
    /// - `x`: rows × k, `y`: rows × n, `bias`: n.
    ///
    /// # Panics
    /// If a length does not fit, or the parts do not tile `0..k`.
    pub fn matmul(
        &self,
        rows: usize,
        x: &[f32],
        weights: &PackedMatrix,
        k_parts: &[Range<usize>],
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        self.product(&Product { rows, weights, k_parts, bias }, Input::Rows(x), Output::Write(y));
    }

    /// x·Wᵀ + bias. What is done with activations before and with results after has the bits that separate passes over
    /// memory would give.
    ///
    /// An empty part counts as −0, the neutral element of IEEE addition (−0 + x is x for every x, −0 included): leaving it
    /// out and adding it are the same. A rank all of whose parts are empty therefore yields −0, and
    /// [`Kernels::sum_tree`] over ranks is the same tree as on one rank, whoever holds empty parts.
    ///
    /// # Panics
    /// If a length does not fit, or the parts do not tile `0..k`.
    pub fn product(&self, product: &Product<'_>, mut input: Input<'_>, output: Output<'_>) {
        let Product { rows, weights, k_parts, bias } = *product;
        let (n, k) = (weights.n(), weights.k());
        match &input {
            Input::Rows(x) => assert_eq!(x.len(), rows * k, "x is rows × k"),
            Input::Normed { x, weight, room, .. } => {
                assert_eq!((x.len(), room.len()), (rows * k, rows * k), "x and its room are rows × k");
                assert_eq!(weight.len(), k, "the norm's weight has k elements");
            }
        }
        assert!(bias.is_none_or(|bias| bias.len() == n), "the bias has n elements");
        assert_parts_tile(k_parts, k);
        let (y, stride, after) = match output {
            Output::Write(y) => (y, n, After::Write),
            Output::Add { y, stride } => (y, stride, After::Add),
            Output::SiluMul { out, room } => {
                assert_eq!(out.len() * 2, rows * n, "out is rows × n/2");
                if !weights.has_aligned_halves() {
                    let gate_up = &mut room[..rows * n];
                    self.product(product, input, Output::Write(gate_up));
                    return self.silu_mul(rows, n / 2, gate_up, out);
                }
                (out, n / 2, After::SiluMul)
            }
        };
        if rows == 0 || n == 0 {
            return;
        }
        let width = if after == After::SiluMul { n / 2 } else { n };
        assert!(width <= stride && y.len() >= (rows - 1) * stride + width, "y has rows of the outputs");
        assert!(after == After::Add || y.len() == rows * width, "y is rows × n");
        let y = DisjointMut::new(y);
        for segments in weights.segments().chunks(SEGMENTS) {
            let quantized = segments.iter().any(|segment| matches!(segment.store, Store::Blocks(_)));
            let blocks = RowBlocks::new(self, rows, ROW_BLOCK, quantized);
            let mut scratch = self.scratch(weights.scratch_words(rows));
            let ready = input::prepare(self, rows, blocks.tiles, &mut input, segments, &mut scratch);
            let call = Call { kernels: self, product, segments, ready, blocks, y: &y, stride };
            match after {
                After::Write => call.each_panel(Epilogue::Write),
                After::Add => call.each_panel(Epilogue::Add),
                After::SiluMul => call.each_pair_of_panels(),
            }
        }
    }
}

/// What follows a product's sums.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    Write,
    Add,
    SiluMul,
}

/// Some segments of a product whose activations are ready.
struct Call<'a> {
    kernels: &'a Kernels,
    product: &'a Product<'a>,
    segments: &'a [Segment],
    ready: [Ready<'a>; SEGMENTS],
    blocks: RowBlocks,
    y: &'a DisjointMut<'a>,
    /// Distance between its rows.
    stride: usize,
}

impl Call<'_> {
    /// Calls `body` with every block of rows × each of `panels` panels, on all threads.
    fn spread(&self, panels: usize, body: impl Fn(usize, usize) + Sync) {
        // Consecutive units share a block of rows and stream through the panels.
        let (units, threads) = (self.blocks.count * panels, self.kernels.threads());
        let tasks = units.min(if threads == 1 { 1 } else { TASKS_PER_THREAD * threads });
        self.kernels.pool().run(tasks, &|task| {
            for unit in task * units / tasks..(task + 1) * units / tasks {
                body(unit / panels, unit % panels);
            }
        });
    }

    fn each_panel(&self, epilogue: Epilogue<'_>) {
        let panels = self.segments.iter().map(Segment::panels).sum();
        self.spread(panels, |block, mut panel| {
            let mut index = 0;
            while panel >= self.segments[index].panels() {
                panel -= self.segments[index].panels();
                index += 1;
            }
            let segment = &self.segments[index];
            let panel = segment.panel(panel);
            let (out, stride, first) = (self.y, self.stride, segment.first + panel.first);
            self.multiply(index, panel, block, Target { out, stride, first, first_row: 0, epilogue });
        });
    }

    /// A panel of gates goes to a small buffer, from which the panel of their ups is multiplied.
    fn each_pair_of_panels(&self) {
        let width = self.product.weights.n() / 2;
        // Both halves in one segment, or each in its own.
        let up = self.segments.len() - 1;
        let skip = if up == 0 { width / PANEL } else { 0 };
        self.spread(width.div_ceil(PANEL), |block, index| {
            let mut buffer = [const { MaybeUninit::<f32>::uninit() }; ROW_BLOCK * PANEL];
            let (_, rows) = self.blocks.block(block);
            let buffer = &mut buffer[..rows.len() * PANEL];
            for element in &mut *buffer {
                element.write(0.0);
            }
            // SAFETY: every element was just written.
            let gates =
                unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<f32>(), buffer.len()) };
            let gate_panel = self.segments[0].panel(index);
            let out = &DisjointMut::new(gates);
            let first_row = rows.start;
            let target = Target { out, stride: PANEL, first: 0, first_row, epilogue: Epilogue::Write };
            self.multiply(0, gate_panel, block, target);
            let epilogue = Epilogue::SiluMul { gates, stride: PANEL };
            let (out, stride, first) = (self.y, self.stride, gate_panel.first);
            let target = Target { out, stride, first, first_row: 0, epilogue };
            self.multiply(up, self.segments[up].panel(skip + index), block, target);
        });
    }

    /// One panel of one segment for one block of rows.
    fn multiply(&self, segment: usize, panel: Panel, block: usize, target: Target<'_>) {
        let ready = self.ready[segment];
        let segment = &self.segments[segment];
        match &segment.store {
            Store::Blocks(matrix) => {
                assert_eq!(
                    matrix.axis().parts(),
                    self.product.k_parts,
                    "the matrix was packed for these parts"
                );
                let (block, rows) = self.blocks.block(block);
                let vectors = panel.width / LANES;
                let weights = matrix.panel(panel.first, vectors);
                let (x, tiles) = (ready.words, self.blocks.tiles);
                with_format!(matrix.kind(), F => {
                    let format = PhantomData::<F>;
                    let chain = IntegerChain { format, matrix, panel: weights, vectors, x, tiles, block };
                    self.finish(segment, panel, rows, chain, target);
                });
            }
            Store::Dense(matrix) => match (matrix.kind, ready.form) {
                (WeightType::F32, _) => {
                    self.dense::<dense::F32>(segment, matrix, ready, panel, block, target)
                }
                (WeightType::F16, _) => {
                    self.dense::<dense::F16>(segment, matrix, ready, panel, block, target)
                }
                (_, Form::WidenedPairs) => {
                    self.dense::<dense::WidenedBf16>(segment, matrix, ready, panel, block, target);
                }
                _ => self.dense::<dense::Bf16>(segment, matrix, ready, panel, block, target),
            },
        }
    }

    fn dense<D: Dense>(
        &self,
        segment: &Segment,
        matrix: &DenseMatrix,
        ready: Ready<'_>,
        panel: Panel,
        block: usize,
        target: Target<'_>,
    ) {
        // In parts of its own where inputs come in pairs; otherwise any cut of the inputs will do.
        let paired = D::INPUTS == 2;
        let brain = matrix.kind == WeightType::Bf16;
        assert!(!brain || matrix.parts() == self.product.k_parts, "the matrix was packed for these parts");
        let steps = if paired { &matrix.steps } else { self.product.k_parts };
        let (_, rows) = self.blocks.block(block);
        let (weights, width) = (matrix.panel(panel.first, panel.width), panel.width);
        let (dense, all_steps) = (PhantomData::<D>, matrix.all_steps());
        let (x, own) = (ready.words, rows.clone());
        let chain = FloatChain { dense, x, all_steps, steps, rows: own, weights, width };
        self.finish(segment, panel, rows, chain, target);
    }

    fn finish<C: Chain>(
        &self,
        segment: &Segment,
        panel: Panel,
        rows: Range<usize>,
        chain: C,
        target: Target<'_>,
    ) {
        let Product { k_parts: parts, bias, .. } = *self.product;
        let first = segment.first + panel.first;
        let product = PanelProduct { chain, rows, parts, panel: Panel { first, ..panel }, bias };
        C::dispatch(self.kernels, PanelKernel { product, target });
    }
}

/// Checks that `parts` are 1, 2, 4 or 8 consecutive ranges that tile `0..k`.
fn assert_parts_tile(parts: &[Range<usize>], k: usize) {
    assert!(matches!(parts.len(), 1 | 2 | 4 | 8), "an axis has 1, 2, 4 or 8 parts here, not {}", parts.len());
    let mut next = 0;
    for part in parts {
        assert!(part.start == next && part.end >= next, "parts {parts:?} are not consecutive");
        next = part.end;
    }
    assert_eq!(next, k, "parts {parts:?} must tile the inputs");
}
