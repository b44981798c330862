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
pub use packed::PackedMatrix;
pub(crate) use run::PanelRun;
pub use stored::{PACKED_VERSION, SegmentLayout, StoredSegment};

use crate::half;
use crate::kernels::Kernels;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use activations::{Extra, QuantizeTile, Tiles};
use ashlar_vocabulary::WeightType;
use blocks::BlockMatrix;
use dense::{Dense, DenseMatrix};
use float::FloatChain;
use formats::{Flavour, Format, with_format};
use integer::IntegerChain;
use packed::{Panel, Segment, Store};
use panel::{Chain, PanelProduct, ROW_BLOCK};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};

/// Tasks per thread, so that dynamic picking levels out threads of unequal speed.
const TASKS_PER_THREAD: usize = 12;

impl Kernels {
    /// y = x·Wᵀ + bias for `rows` rows of activations.
    ///
    /// - `x`: rows × k, `y`: rows × n, `bias`: n.
    /// - `k_parts`: 1, 2, 4 or 8 consecutive ranges that tile `0..k`; they may be empty. Each part is one ascending
    ///   chain; parts combine as `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))`, the bias comes last.
    ///
    /// An empty part counts as −0, the neutral element of IEEE addition (−0 + x is x for every x, −0 included): leaving it
    /// out and adding it are the same. A rank all of whose parts are empty therefore yields −0, and
    /// [`Kernels::sum_tree`] over ranks is the same tree as on one rank, whoever holds empty parts.
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
        let n = weights.n();
        assert_eq!(y.len(), rows * n, "y is rows × n");
        assert!(bias.is_none_or(|bias| bias.len() == n), "the bias has n elements");
        let y = DisjointMut::new(y);
        self.product(rows, x, weights, k_parts, bias, Output { y: &y, stride: n, add: false });
    }

    /// y ← y + x·Wᵀ: [`Kernels::matmul`], its result added by one rounded addition to rows that begin with n elements.
    ///
    /// # Panics
    /// If a length does not fit, or the parts do not tile `0..k`.
    pub fn add_matmul(
        &self,
        rows: usize,
        x: &[f32],
        weights: &PackedMatrix,
        k_parts: &[Range<usize>],
        y: &mut [f32],
        stride: usize,
    ) {
        let n = weights.n();
        assert!(n <= stride, "rows of {n} fit a stride of {stride}");
        assert!(rows == 0 || y.len() >= (rows - 1) * stride + n, "y has rows of n");
        let y = DisjointMut::new(y);
        self.product(rows, x, weights, k_parts, None, Output { y: &y, stride, add: true });
    }

    fn product(
        &self,
        rows: usize,
        x: &[f32],
        weights: &PackedMatrix,
        k_parts: &[Range<usize>],
        bias: Option<&[f32]>,
        output: Output<'_>,
    ) {
        let (n, k) = (weights.n(), weights.k());
        assert_eq!(x.len(), rows * k, "x is rows × k");
        assert_parts_tile(k_parts, k);
        if rows == 0 || n == 0 {
            return;
        }
        for segment in weights.segments().iter().filter(|segment| segment.n > 0) {
            let product = Product { segment, k_parts, bias, output };
            match &segment.store {
                Store::Dense(matrix) => self.dense_product(&product, rows, x, matrix),
                Store::Blocks(matrix) => self.integer_product(&product, rows, x, matrix),
            }
        }
    }

    fn dense_product(&self, product: &Product<'_>, rows: usize, x: &[f32], matrix: &DenseMatrix) {
        // SAFETY: floats and words are of one size and alignment, and any bits are a word.
        let words = unsafe { std::slice::from_raw_parts(x.as_ptr().cast::<u32>(), x.len()) };
        match matrix.kind {
            WeightType::F32 => self.dense_product_of::<dense::F32>(product, rows, words, matrix),
            WeightType::F16 => self.dense_product_of::<dense::F16>(product, rows, words, matrix),
            _ => self.pair_product(product, rows, x, matrix),
        }
    }

    /// Products of brain floats, by whichever of the ways that give the same bits is fastest here.
    fn pair_product(&self, product: &Product<'_>, rows: usize, x: &[f32], matrix: &DenseMatrix) {
        assert_eq!(matrix.parts(), product.k_parts, "the matrix was packed for these parts");
        let (k, all_steps) = (x.len() / rows, matrix.all_steps());
        let mut scratch = self.scratch(2 * rows * all_steps);
        if !self.pairs_are_fast() {
            let words = &mut scratch[..2 * rows * all_steps];
            let exponent = AtomicI32::new(i32::MAX / 2);
            let to = DisjointMut::new(words);
            self.for_ranges(rows, 8, |range| {
                for row in range {
                    // SAFETY: rows are disjoint.
                    let words = unsafe { to.range(2 * row * all_steps..2 * (row + 1) * all_steps) };
                    let mut least = i32::MAX / 2;
                    for (part, steps) in matrix.parts().iter().zip(&matrix.steps) {
                        let words = &mut words[2 * steps.start..2 * steps.end];
                        words.last_mut().into_iter().for_each(|last| *last = 0);
                        for (x, word) in x[row * k..][part.clone()].iter().zip(words) {
                            let x = half::brain_float(*x);
                            least = least.min(dense::exponent(x));
                            *word = x.to_bits();
                        }
                    }
                    exponent.fetch_min(least, Ordering::Relaxed);
                }
            });
            if exponent.into_inner() + matrix.exponent >= dense::EXPONENTS_MIN {
                return self.dense_product_of::<dense::WidenedBf16>(product, rows, words, matrix);
            }
        }
        let words = &mut scratch[..rows * all_steps];
        let to = DisjointMut::new(words);
        self.for_ranges(rows, 8, |range| {
            for row in range {
                // SAFETY: rows are disjoint.
                let words = unsafe { to.range(row * all_steps..(row + 1) * all_steps) };
                for (part, steps) in matrix.parts().iter().zip(&matrix.steps) {
                    for (pair, word) in x[row * k..][part.clone()].chunks(2).zip(&mut words[steps.clone()]) {
                        *word = dense::pair(pair[0], pair.get(1).copied().unwrap_or(0.0));
                    }
                }
            }
        });
        self.dense_product_of::<dense::Bf16>(product, rows, words, matrix);
    }

    fn dense_product_of<D: Dense>(
        &self,
        product: &Product<'_>,
        rows: usize,
        x: &[u32],
        matrix: &DenseMatrix,
    ) {
        let row_blocks = rows.div_ceil(ROW_BLOCK);
        // In parts of its own where inputs come in pairs; otherwise any cut of the inputs will do.
        let steps = if D::INPUTS == 2 { &matrix.steps } else { product.k_parts };
        self.run_product(product, row_blocks, |block, panel| {
            let rows = block * rows / row_blocks..(block + 1) * rows / row_blocks;
            let (weights, width) = (matrix.panel(panel.first, panel.width), panel.width);
            let (dense, all_steps) = (PhantomData::<D>, matrix.all_steps());
            (rows.clone(), FloatChain { dense, x, all_steps, steps, rows, weights, width })
        });
    }

    fn integer_product(&self, product: &Product<'_>, rows: usize, x: &[f32], matrix: &BlockMatrix) {
        assert_eq!(matrix.axis().parts(), product.k_parts, "the matrix was packed for these parts");
        self.with_integers(rows, x, matrix, |tiles, tiles_per_block, x| {
            let row_blocks = tiles.count.div_ceil(tiles_per_block);
            with_format!(matrix.kind(), F => {
                self.run_product(product, row_blocks, |block, panel| {
                    let block = block * tiles.count / row_blocks..(block + 1) * tiles.count / row_blocks;
                    let rows = tiles.rows(block.start).start..tiles.rows(block.end - 1).end;
                    let vectors = panel.width / LANES;
                    let panel = matrix.panel(panel.first, vectors);
                    let format = PhantomData::<F>;
                    (rows, IntegerChain { format, matrix, panel, vectors, x, tiles, block })
                });
            })
        });
    }

    /// Spreads a product over the threads. `chain` makes what computes a block of rows × a panel, and names the rows.
    fn run_product<C: Chain>(
        &self,
        product: &Product<'_>,
        row_blocks: usize,
        chain: impl Fn(usize, Panel) -> (Range<usize>, C) + Sync,
    ) {
        let Product { segment, k_parts, bias, output: Output { y, stride, add } } = *product;
        let panels = segment.panels();
        // Consecutive units share a block of rows and stream through the panels.
        let units = row_blocks * panels;
        let tasks = units.min(if self.threads() == 1 { 1 } else { TASKS_PER_THREAD * self.threads() });
        self.pool().run(tasks, &|task| {
            for unit in task * units / tasks..(task + 1) * units / tasks {
                let panel = segment.panel(unit % panels);
                let (rows, chain) = chain(unit / panels, panel);
                let first = segment.first + panel.first;
                let panel = Panel { first, ..panel };
                let product = PanelProduct { chain, rows, parts: k_parts, panel, bias, stride, add };
                C::dispatch(self, product.into_output(y));
            }
        });
    }

    /// Quantises the activations for `matrix`, tile by tile, and passes on the tiles, how many make a block of rows, and
    /// the result.
    fn with_integers(
        &self,
        rows: usize,
        x: &[f32],
        matrix: &BlockMatrix,
        body: impl FnOnce(Tiles, usize, &[u32]),
    ) {
        let tile_rows = self.dispatch(TileRows);
        let (tiles, axis) = (Tiles::new(rows, tile_rows), matrix.axis());
        let row_words = axis.pieces().len() * activations::WORDS;
        let extra = self.dispatch(ExtraOf(matrix.kind()));
        let mut scratch = self.scratch(rows * row_words);
        let words = &mut scratch[..rows * row_words];
        {
            let words = DisjointMut::new(words);
            // A tile of one row takes a fraction of a microsecond: a few are not worth waking threads for.
            let tasks = if tiles.count < 4 { 1 } else { tiles.count };
            self.pool().run(tasks, &|task| {
                for tile in task * tiles.count / tasks..(task + 1) * tiles.count / tasks {
                    let range = tiles.rows(tile);
                    let x = &x[range.start * axis.k()..range.end * axis.k()];
                    // SAFETY: tiles are disjoint rows.
                    let out = unsafe { words.range(range.start * row_words..range.end * row_words) };
                    self.dispatch(QuantizeTile { x, rows: range.len(), axis, extra, out });
                }
            });
        }
        body(tiles, ROW_BLOCK / tile_rows, words);
    }
}

/// What a product multiplies with, and where its results go.
#[derive(Clone, Copy)]
struct Product<'a> {
    segment: &'a Segment,
    k_parts: &'a [Range<usize>],
    bias: Option<&'a [f32]>,
    output: Output<'a>,
}

/// Where a product's rows go.
#[derive(Clone, Copy)]
struct Output<'a> {
    y: &'a DisjointMut<'a>,
    /// Distance between rows.
    stride: usize,
    /// Whether they are added to what is there.
    add: bool,
}

/// Rows of the tallest integer tile of an instruction set.
struct TileRows;

impl LaneKernel for TileRows {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd16>(self) -> usize {
        S::Int::TILE_ROWS
    }
}

/// What a format needs to know of the activations on an instruction set.
struct ExtraOf(WeightType);

impl LaneKernel for ExtraOf {
    type Output = Extra;
    #[inline(always)]
    fn run<S: Simd16>(self) -> Extra {
        with_format!(self.0, F => {
            type K = <F as Format>::Flavour;
            let zero = if K::WIDE { S::Int::WIDE_ZERO } else { F::ZERO };
            if K::HALVES { Extra::HalfSums { zero } } else { Extra::WholeSum { zero } }
        })
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
