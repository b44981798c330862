//! Plain elements as files hold them, on their way into a matrix: sixteen rows at a time.
//!
//! A file has one row after another; a matrix has sixteen rows' steps side by side. Words are transposed, four columns at a
//! time; what a part has beyond whole columns of sixteen bytes goes one by one.

use super::dense::{self, Bf16, Dense, DenseMatrix, F16, F32};
use super::file_rows::{self, ReadRows};
use super::packed::{PANEL, locate, panel_width};
use crate::aligned::AlignedBuffer;
use crate::half;
use crate::kernels::Kernels;
use crate::lanes::{self, Int16, LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use ashlar_vocabulary::WeightType;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};

/// Whether weights stored as `stored` go straight into a matrix of `kind`.
pub(super) fn is_direct(stored: WeightType, kind: WeightType) -> bool {
    match stored {
        WeightType::F32 | WeightType::F16 => stored == kind,
        WeightType::Bf16 => matches!(kind, WeightType::Bf16 | WeightType::F32),
        _ => false,
    }
}

/// See [`PackedMatrix::pack_file_floats`](super::PackedMatrix::pack_file_floats).
pub(super) fn pack<E: Send>(
    stored: WeightType,
    kind: WeightType,
    n: usize,
    parts: &[Range<usize>],
    kernels: &Kernels,
    read: &ReadRows<'_, E>,
) -> Result<DenseMatrix, E> {
    match (stored, kind) {
        (WeightType::F32, WeightType::F32) => pack_as::<Words, E>(kind, n, parts, kernels, read),
        (WeightType::F16, WeightType::F16) => pack_as::<Halves, E>(kind, n, parts, kernels, read),
        (WeightType::Bf16, WeightType::Bf16) => pack_as::<Pairs, E>(kind, n, parts, kernels, read),
        (WeightType::Bf16, WeightType::F32) => pack_as::<Widened, E>(kind, n, parts, kernels, read),
        _ => panic!("{stored} does not go straight into a matrix of {kind}"),
    }
}

fn pack_as<T: Transfer, E: Send>(
    kind: WeightType,
    n: usize,
    parts: &[Range<usize>],
    kernels: &Kernels,
    read: &ReadRows<'_, E>,
) -> Result<DenseMatrix, E> {
    let steps = dense::steps(kind, parts);
    let mut data = AlignedBuffer::zeroed(dense::words(kind, n, parts));
    let row_bytes = parts.last().map_or(0, |part| part.end) * T::BYTES;
    let nothing = vec![0; row_bytes];
    let exponent = AtomicI32::new(i32::MAX / 2);
    let to = DisjointMut::new(data.as_bytes_mut());
    file_rows::for_sixteens(n, row_bytes, &nothing, kernels, read, &|first, rows| {
        let sixteen = Sixteen::<T> { n, first, rows, parts, steps: &steps, to: &to, transfer: PhantomData };
        let least = kernels.dispatch(sixteen);
        if kind == WeightType::Bf16 {
            exponent.fetch_min(least, Ordering::Relaxed);
        }
    })?;
    Ok(DenseMatrix::from_data(kind, n, parts, exponent.into_inner(), data))
}

/// How stored elements become those of a matrix.
trait Transfer: Sync {
    /// What the matrix has.
    type To: Dense;
    /// Bytes of a stored element.
    const BYTES: usize;
    /// Steps that sixteen stored bytes make.
    const STEPS: usize = 16 / Self::BYTES / Self::To::INPUTS;

    /// Lays out [`Self::STEPS`] steps of sixteen outputs, `stride` bytes apart; `least` becomes the smallest size of an
    /// element that is not zero, per lane, where that is asked for.
    ///
    /// # Safety
    /// `to` must be valid for these steps.
    unsafe fn lay_out<S: Simd16>(columns: [S::Int; 4], to: *mut u8, stride: usize, least: &mut S);
    /// Widens one stored element.
    fn widen(element: &[u8]) -> f32;
}

/// f32 as it is.
struct Words;
/// Halves as they are.
struct Halves;
/// Brain floats in pairs, the earlier in the high half; subnormal ones are zero.
struct Pairs;
/// Brain floats that become f32; subnormal ones are zero.
struct Widened;

impl Transfer for Words {
    type To = F32;
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(columns: [S::Int; 4], to: *mut u8, stride: usize, _least: &mut S) {
        for (step, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { column.store(to.add(step * stride)) };
        }
    }
    fn widen(element: &[u8]) -> f32 {
        f32::from_le_bytes([element[0], element[1], element[2], element[3]])
    }
}

impl Transfer for Halves {
    type To = F16;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(columns: [S::Int; 4], to: *mut u8, stride: usize, _least: &mut S) {
        for (pair, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                column.store_halves(to.add(2 * pair * stride).cast());
                column.shift_right::<16>().store_halves(to.add((2 * pair + 1) * stride).cast());
            }
        }
    }
    fn widen(element: &[u8]) -> f32 {
        half::widen(u16::from_le_bytes([element[0], element[1]]))
    }
}

/// Both brain floats of every word, widened: the earlier is in the low half.
#[inline(always)]
fn brain_floats<S: Simd16>(words: S::Int) -> [S; 2] {
    let first = words.shift_left::<16>().as_float();
    let second = words.and(S::Int::splat(0xffff_0000_u32 as i32)).as_float();
    [lanes::flush(first), lanes::flush(second)]
}

/// The smaller of `least` and the size of `value`, unless that is zero.
#[inline(always)]
fn least_size<S: Simd16>(value: S, least: S) -> S {
    let size = value.to_bits().and(S::Int::splat(0x7fff_ffff)).as_float();
    let size = size.select_less(S::splat(f32::MIN_POSITIVE), S::splat(f32::INFINITY), size);
    size.select_less(least, size, least)
}

impl Transfer for Pairs {
    type To = Bf16;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(columns: [S::Int; 4], to: *mut u8, stride: usize, least: &mut S) {
        for (step, column) in columns.into_iter().enumerate() {
            let [first, second] = brain_floats::<S>(column);
            *least = least_size(second, least_size(first, *least));
            let pair = first.to_bits().or(second.to_bits().shift_right::<16>());
            // SAFETY: the caller's contract.
            unsafe { pair.store(to.add(step * stride)) };
        }
    }
    fn widen(element: &[u8]) -> f32 {
        Widened::widen(element)
    }
}

impl Transfer for Widened {
    type To = F32;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(columns: [S::Int; 4], to: *mut u8, stride: usize, _least: &mut S) {
        for (pair, column) in columns.into_iter().enumerate() {
            let [first, second] = brain_floats::<S>(column);
            // SAFETY: the caller's contract.
            unsafe {
                first.to_bits().store(to.add(2 * pair * stride));
                second.to_bits().store(to.add((2 * pair + 1) * stride));
            }
        }
    }
    fn widen(element: &[u8]) -> f32 {
        let wide = f32::from_bits(u32::from(u16::from_le_bytes([element[0], element[1]])) << 16);
        if wide.abs() < f32::MIN_POSITIVE { 0f32.copysign(wide) } else { wide }
    }
}

/// Packs sixteen outputs; returns the smallest exponent of any brain float that is not zero.
struct Sixteen<'a, T> {
    n: usize,
    first: usize,
    rows: [*const u8; LANES],
    parts: &'a [Range<usize>],
    /// Steps of each part.
    steps: &'a [Range<usize>],
    to: &'a DisjointMut<'a, u8>,
    transfer: PhantomData<T>,
}

impl<T: Transfer> LaneKernel for Sixteen<'_, T> {
    type Output = i32;

    #[inline(always)]
    fn run<S: Simd16>(self) -> i32 {
        let all_steps = self.steps.last().map_or(0, |steps| steps.end);
        let (start, _) = locate(self.n, all_steps, self.first);
        let stride = panel_width(self.n, self.first / PANEL) * T::To::BYTES;
        let (mut least, mut exponent) = (S::splat(f32::INFINITY), i32::MAX / 2);
        for (part, steps) in self.parts.iter().zip(self.steps) {
            let mut at = start * T::To::BYTES + steps.start * stride;
            let mut input = part.start;
            while input + 16 / T::BYTES <= part.end {
                let end = at + (T::STEPS - 1) * stride + LANES * T::To::BYTES;
                // SAFETY: the bytes between the sixteen outputs' own are not touched, and these belong to one task. Rows are
                // as long as all parts, and sixteen bytes of this one are left.
                unsafe {
                    let to = self.to.shared(at..end);
                    T::lay_out::<S>(
                        S::Int::load_columns(&self.rows, input * T::BYTES),
                        to,
                        stride,
                        &mut least,
                    );
                }
                at += T::STEPS * stride;
                input += 16 / T::BYTES;
            }
            while input < part.end {
                let inputs = T::To::INPUTS.min(part.end - input);
                // SAFETY: sixteen outputs belong to one task.
                let step = unsafe { self.to.range(at..at + LANES * T::To::BYTES) };
                for (row, to) in self.rows.iter().zip(step.chunks_exact_mut(T::To::BYTES)) {
                    let mut values = [0.0; 2];
                    for (index, value) in values[..inputs].iter_mut().enumerate() {
                        // SAFETY: rows are as long as all parts.
                        *value = T::widen(unsafe {
                            std::slice::from_raw_parts(row.add((input + index) * T::BYTES), T::BYTES)
                        });
                        exponent = exponent.min(dense::exponent(*value));
                    }
                    T::To::store(&values[..inputs], to);
                }
                at += stride;
                input += inputs;
            }
        }
        for size in least.to_array() {
            if size < f32::INFINITY {
                exponent = exponent.min(dense::exponent(size));
            }
        }
        exponent
    }
}
