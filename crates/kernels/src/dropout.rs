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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use ashlar_vocabulary::random::dropout_key;

    fn rows(count: u32) -> Vec<DropoutRow> {
        (0..count).map(|row| DropoutRow { key: dropout_key(7, 3, row / 5, 0), position: row % 5 }).collect()
    }

    #[test]
    fn a_share_is_zero_and_the_mean_stays() {
        let (kernels, rows) = (Kernels::new(Isa::best(), 2), rows(64));
        let share = 0.3;
        let dropout = Dropout {
            threshold: (share * 2_f64.powi(32)) as u32,
            factor: (1.0 / (1.0 - share)) as f32,
            rows: &rows,
            stream: 9,
            first: 0,
        };
        let x = vec![1.0; 64 * 256];
        let mut out = vec![f32::NAN; x.len()];
        kernels.drop_out(&dropout, 256, &x, &mut out);
        assert!(out.iter().all(|x| *x == 0.0 || *x == dropout.factor));
        let zeros = out.iter().filter(|x| **x == 0.0).count() as f64 / out.len() as f64;
        assert!((zeros - share).abs() < 0.01, "{zeros}");
        // Added to nothing it is the same, with the same elements.
        let mut sum = vec![0.0; x.len()];
        kernels.add_dropped(&dropout, 256, &x, &mut sum);
        assert_eq!(sum, out);
        let other = Dropout { stream: 10, ..dropout };
        kernels.drop_out(&other, 256, &x, &mut sum);
        assert_ne!(sum, out, "every layer has a mask of its own");
    }

    #[test]
    fn neither_the_cut_of_rows_nor_that_of_columns_shows() {
        let (kernels, rows) = (Kernels::new(Isa::best(), 1), rows(11));
        let width = 37;
        let dropout = Dropout { threshold: 1 << 30, factor: 1.5, rows: &rows, stream: 2, first: 0 };
        let x: Vec<f32> = (0..11 * width).map(|i| i as f32 + 1.0).collect();
        let mut whole = vec![0.0; x.len()];
        kernels.drop_out(&dropout, width, &x, &mut whole);
        for (row, (x, whole)) in x.chunks(width).zip(whole.chunks(width)).enumerate() {
            for columns in [0..5, 5..6, 6..37] {
                let cut = Dropout { rows: &rows[row..row + 1], first: columns.start, ..dropout };
                let mut part = vec![0.0; columns.len()];
                kernels.drop_out(&cut, columns.len(), &x[columns.clone()], &mut part);
                assert_eq!(part, whole[columns]);
            }
        }
    }

    #[test]
    fn what_is_dropped_is_zero_even_if_it_is_no_number() {
        let (kernels, rows) = (Kernels::new(Isa::best(), 1), rows(1));
        let dropout = Dropout { threshold: u32::MAX, factor: 2.0, rows: &rows, stream: 0, first: 0 };
        let mut out = [1.0; 3];
        kernels.drop_out(&dropout, 3, &[f32::NAN, f32::INFINITY, -1.0], &mut out);
        assert_eq!(out.map(f32::to_bits), [0; 3]);
    }
}
