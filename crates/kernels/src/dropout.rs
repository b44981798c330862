//! Dropout: elements of rows that are zero for once, and the others larger for it.
//!
//! Which ones is a function of a row's key and position and of the element's place in the whole model, so that neither the cut of
//! rows nor that of columns shows, and a backward pass has the same mask without keeping it.

use crate::kernels::Kernels;
use crate::strided::DisjointMut;
use ashlar_vocabulary::random::{Purpose, philox};

/// Rows below which another thread is not worth its wake-up: of each element ten rounds of the generator are a quarter.
const MIN_ELEMENTS: usize = 4 << 10;
/// Words of one call of the generator.
const WORDS: usize = 4;

/// What decides a row's mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutRow {
    /// Of its sequence in this step, see [`dropout_key`](ashlar_vocabulary::random::dropout_key).
    pub key: [u32; 2],
    /// Its place in the sequence.
    pub position: u32,
}

/// Which elements of some rows are zero.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// An element whose word is below it is zero.
    pub threshold: u32,
    /// What the others are multiplied by.
    pub factor: f32,
    /// The rows.
    pub rows: &'a [DropoutRow],
    /// Which of the model's linear layers they enter.
    pub stream: u32,
    /// The place of their first element among that layer's inputs.
    pub first: usize,
}

impl Dropout<'_> {
    /// Tells `body` of every element of a row whether it is kept.
    fn row(&self, row: usize, width: usize, mut body: impl FnMut(usize, bool)) {
        let DropoutRow { key, position } = self.rows[row];
        let (mut block, mut words) = (usize::MAX, [0; WORDS]);
        for column in 0..width {
            let element = self.first + column;
            if element / WORDS != block {
                block = element / WORDS;
                words = philox([block as u32, position, Purpose::Dropout as u32, self.stream], key);
            }
            body(column, words[element % WORDS] >= self.threshold);
        }
    }
}

impl Kernels {
    /// out = x · factor where an element is kept, 0 elsewhere; both are rows × width.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn drop_out(&self, dropout: &Dropout<'_>, width: usize, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), dropout.rows.len() * width, "x is rows × width");
        assert_eq!(out.len(), x.len(), "out is rows × width");
        self.for_dropped_rows(dropout, width, out, |row, out| {
            let x = &x[row * width..][..width];
            dropout.row(row, width, |column, kept| {
                out[column] = if kept { x[column] * dropout.factor } else { 0.0 };
            });
        });
    }

    /// out ← out + x · factor where an element is kept, by one rounded product and one rounded addition: the gradient of
    /// [`Kernels::drop_out`] by its input, added. Both are rows × width.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn add_dropped(&self, dropout: &Dropout<'_>, width: usize, x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), dropout.rows.len() * width, "x is rows × width");
        assert_eq!(out.len(), x.len(), "out is rows × width");
        self.for_dropped_rows(dropout, width, out, |row, out| {
            let x = &x[row * width..][..width];
            dropout.row(row, width, |column, kept| {
                if kept {
                    out[column] += x[column] * dropout.factor;
                }
            });
        });
    }

    fn for_dropped_rows(
        &self,
        dropout: &Dropout<'_>,
        width: usize,
        out: &mut [f32],
        body: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let output = DisjointMut::new(out);
        self.for_ranges(dropout.rows.len(), MIN_ELEMENTS.div_ceil(width.max(1)), |rows| {
            for row in rows {
                // SAFETY: rows are disjoint.
                body(row, unsafe { output.range(row * width..(row + 1) * width) });
            }
        });
    }
}
