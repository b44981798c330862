//! Turning a matrix around, sixteen rows × four columns at a time in registers.

use crate::lanes::{Int16, LANES, Simd16};

/// Columns that [`Int16::load_columns`] takes at once.
const COLUMNS: usize = 4;

/// A matrix in memory: where it begins, and the distance between its rows, in elements.
#[derive(Clone, Copy)]
pub(crate) struct Place<T> {
    pub(crate) data: T,
    pub(crate) stride: usize,
}

/// `to[c][r] = from[r][c]`, or `to[c][r] += from[r][c]` where `ADD`, for `rows` rows and `columns` columns of `from`.
///
/// # Safety
/// Both must be valid for these extents, `to` initialised where it is added to; they must not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd16, const ADD: bool>(
    from: Place<*const f32>,
    rows: usize,
    columns: usize,
    to: Place<*mut f32>,
) {
    let (whole_rows, whole_columns) = (rows / LANES * LANES, columns / COLUMNS * COLUMNS);
    // SAFETY (of all blocks): rows and columns stay within the caller's extents.
    for first in (0..whole_rows).step_by(LANES) {
        let mut sixteen = [from.data.cast::<u8>(); LANES];
        for (row, start) in sixteen.iter_mut().enumerate() {
            *start = unsafe { from.data.add((first + row) * from.stride) }.cast();
        }
        for column in (0..whole_columns).step_by(COLUMNS) {
            let four = unsafe { S::Int::load_columns(&sixteen, column * size_of::<f32>()) };
            for (index, turned) in four.into_iter().enumerate() {
                unsafe {
                    let to = to.data.add((column + index) * to.stride + first);
                    let turned = turned.as_float();
                    let turned = if ADD { S::load(to).add(turned) } else { turned };
                    turned.store(to);
                }
            }
        }
    }
    for row in 0..rows {
        let rest = if row < whole_rows { whole_columns } else { 0 };
        for column in rest..columns {
            unsafe {
                let (from, to) =
                    (from.data.add(row * from.stride + column), to.data.add(column * to.stride + row));
                *to = if ADD { *to + *from } else { *from };
            }
        }
    }
}
