//! What enters a product, made ready once for all segments of the matrix.
//!
//! Quantised weights meet integers, brain floats meet brain floats, others the rows as they are. Segments that need the same
//! share it; rows that are quantised are normed on the way.

use super::activations::{Extra, QuantizeTile, Tiles, WORDS};
use super::blocks::BlockMatrix;
use super::dense::{self, DenseMatrix};
use super::formats::{Flavour, Format, with_format};
use super::packed::{Segment, Store};
use crate::half;
use crate::kernels::Kernels;
use crate::lanes::{Int16, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use ashlar_vocabulary::WeightType;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};

/// Most segments that are made ready together.
pub(super) const SEGMENTS: usize = 4;

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 4 << 10;

/// Rows of activations on their way into a product.
#[derive(Debug)]
pub enum Input<'a> {
    /// As they are: rows × k.
    Rows(&'a [f32]),
    /// `x · 1/√(mean(x²) + eps) · weight`, as [`Kernels::rms_norm`] computes it.
    Normed {
        /// Rows × k.
        x: &'a [f32],
        /// k elements.
        weight: &'a [f32],
        /// Keeps the root away from zero.
        eps: f32,
        /// Room for rows × k, used where the weights are not quantised.
        room: &'a mut [f32],
    },
}

/// A norm that is applied while rows are quantised.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowNorm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
}

/// What a segment multiplies with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ready<'a> {
    pub(super) form: Form,
    pub(super) words: &'a [u32],
}

/// How activations lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Floats.
    Plain,
    /// Pairs of brain floats, by part.
    Pairs,
    /// Brain floats as floats, by part.
    WidenedPairs,
    /// Integers, by tile of rows.
    Integers(Extra),
}

/// Makes `input` ready for up to [`SEGMENTS`] segments. `scratch` has the words that they say they need.
pub(super) fn prepare<'a>(
    kernels: &Kernels,
    rows: usize,
    tiles: Tiles,
    input: &'a mut Input<'_>,
    segments: &[Segment],
    mut scratch: &'a mut [u32],
) -> [Ready<'a>; SEGMENTS] {
    let (x, norm) = match input {
        Input::Rows(x) => (*x, None),
        Input::Normed { x, weight, eps, room } => {
            if segments.iter().any(|segment| matches!(segment.store, Store::Dense(_))) {
                kernels.rms_norm(rows, weight.len(), x, weight, *eps, room);
            }
            (*x, Some((RowNorm { weight, eps: *eps }, &**room)))
        }
    };
    let plain = norm.map_or(x, |(_, normed)| normed);
    let norm = norm.map(|(norm, _)| norm);
    let mut ready = [Ready { form: Form::Plain, words: words_of(plain) }; SEGMENTS];
    for (index, segment) in segments.iter().enumerate() {
        let (before, rest) = ready.split_at_mut(index);
        let room = segment.store.words_per_row() * rows;
        rest[0] = match &segment.store {
            Store::Dense(matrix) if matrix.kind == WeightType::Bf16 => {
                let (area, left) = scratch.split_at_mut(room);
                scratch = left;
                kernels.brain_floats(rows, plain, matrix, area)
            }
            Store::Dense(_) => continue,
            Store::Blocks(matrix) => {
                let form = Form::Integers(kernels.dispatch(ExtraOf(matrix.kind())));
                if let Some(same) = before.iter().find(|before| before.form == form) {
                    *same
                } else {
                    let (area, left) = scratch.split_at_mut(room);
                    scratch = left;
                    kernels.integers(tiles, x, norm, matrix, form, area)
                }
            }
        };
    }
    ready
}

/// The bits of floats.
fn words_of(x: &[f32]) -> &[u32] {
    // SAFETY: floats and words are of one size and alignment, and any bits are a word.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast::<u32>(), x.len()) }
}

impl Kernels {
    /// Brain floats for whichever of the ways of multiplying them that give the same bits is fastest here.
    fn brain_floats<'a>(
        &self,
        rows: usize,
        x: &[f32],
        matrix: &DenseMatrix,
        area: &'a mut [u32],
    ) -> Ready<'a> {
        let (k, all_steps) = (x.len() / rows, matrix.all_steps());
        if !self.pairs_are_fast() {
            let words = &mut area[..2 * rows * all_steps];
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
                return Ready { form: Form::WidenedPairs, words: &area[..2 * rows * all_steps] };
            }
        }
        let words = &mut area[..rows * all_steps];
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
        Ready { form: Form::Pairs, words: &area[..rows * all_steps] }
    }

    /// Integers, tile by tile. Where tiles are few, their pieces are cut too: every task then norms its rows for itself,
    /// which takes less time than waiting for another to do so.
    fn integers<'a>(
        &self,
        tiles: Tiles,
        x: &[f32],
        norm: Option<RowNorm<'_>>,
        matrix: &BlockMatrix,
        form: Form,
        area: &'a mut [u32],
    ) -> Ready<'a> {
        let Form::Integers(extra) = form else { unreachable!("integers are asked for") };
        let axis = matrix.axis();
        let pieces = axis.pieces().len();
        let words = &mut area[..tiles.rows * pieces * WORDS];
        let to = DisjointMut::new(words);
        let tile_elements = tiles.rows.div_ceil(tiles.count) * axis.k();
        let cuts = if tiles.count < 2 * self.threads() && self.threads() > 1 {
            (2 * self.threads())
                .div_ceil(tiles.count)
                .min(tile_elements / MIN_ELEMENTS)
                .clamp(1, pieces.max(1))
        } else {
            1
        };
        // A tile of one row takes a fraction of a microsecond: a few are not worth waking threads for.
        let all = tiles.rows * axis.k();
        let units = tiles.count * cuts;
        let tasks = units.min((all / MIN_ELEMENTS).max(1)).min(TASKS_PER_THREAD * self.threads());
        self.pool().run(tasks, &|task| {
            for unit in task * units / tasks..(task + 1) * units / tasks {
                let (rows, cut) = (tiles.rows(unit / cuts), unit % cuts);
                let own = cut * pieces / cuts..(cut + 1) * pieces / cuts;
                let first = rows.start * pieces;
                let at = |piece: usize| (first + piece * rows.len()) * WORDS;
                // SAFETY: tiles are disjoint rows, and cuts disjoint pieces of them.
                let out = unsafe { to.range(at(own.start)..at(own.end)) };
                let x = &x[rows.start * axis.k()..rows.end * axis.k()];
                self.dispatch(QuantizeTile { x, rows: rows.len(), axis, pieces: own, norm, extra, out });
            }
        });
        Ready { form, words: &area[..tiles.rows * pieces * WORDS] }
    }
}

/// Tasks per thread while activations are made ready.
const TASKS_PER_THREAD: usize = 4;

/// How the rows of a call fall into blocks that pass over a panel together.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowBlocks {
    pub(super) tiles: Tiles,
    pub(super) count: usize,
}

impl RowBlocks {
    /// Blocks of at most `most` rows: of whole tiles where some weights are quantised.
    pub(super) fn new(kernels: &Kernels, rows: usize, most: usize, whole_tiles: bool) -> RowBlocks {
        let tile_rows = if whole_tiles { kernels.dispatch(TileRows) } else { 1 };
        let tiles = Tiles::new(rows, tile_rows);
        RowBlocks { tiles, count: tiles.count.div_ceil(most / tile_rows) }
    }

    /// The tiles of a block, and their rows.
    pub(super) fn block(&self, block: usize) -> (Range<usize>, Range<usize>) {
        let tiles = block * self.tiles.count / self.count..(block + 1) * self.tiles.count / self.count;
        let rows = self.tiles.rows(tiles.start).start..self.tiles.rows(tiles.end - 1).end;
        (tiles, rows)
    }
}

/// Rows of the tallest integer tile of an instruction set.
struct TileRows;

impl LaneKernel for TileRows {
    const MULTIPLIES_BYTES: bool = true;
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd16>(self) -> usize {
        S::Int::TILE_ROWS
    }
}

/// What a format needs to know of the activations on an instruction set.
struct ExtraOf(WeightType);

impl LaneKernel for ExtraOf {
    const MULTIPLIES_BYTES: bool = true;
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
