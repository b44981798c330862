//! Numbers narrower than `f32`, as caches hold them and as rows travel: rounded once, widened exactly.

use crate::half;
use crate::kernels::Kernels;
use crate::lanes::{LaneKernel, Simd16};
use crate::strided::DisjointMut;
use ashlar_vocabulary::FloatType;
use std::marker::PhantomData;

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 16 << 10;

/// An element of a [`FloatType`].
///
/// # Safety
/// Implementors are plain numbers of `KIND.bytes()` bytes, aligned to no more, for which every bit pattern is valid.
pub(crate) unsafe trait Element: Copy + Send + Sync + 'static {
    /// The type that it is an element of.
    const KIND: FloatType;

    /// The nearest element, ties to even.
    fn round(value: f32) -> Self;

    /// Its value, exactly.
    fn value(self) -> f32;

    /// Writes it, little-endian, to `KIND.bytes()` bytes.
    fn write(self, to: &mut [u8]);

    /// Reads it from as many.
    fn read(from: &[u8]) -> Self;

    /// Widens sixteen elements, exactly.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen elements; no alignment beyond the element's is needed.
    unsafe fn load<S: Simd16>(from: *const Self) -> S;
}

// SAFETY: a plain number of four bytes.
unsafe impl Element for f32 {
    const KIND: FloatType = FloatType::F32;

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn write(self, to: &mut [u8]) {
        to.copy_from_slice(&self.to_le_bytes());
    }
    #[inline(always)]
    fn read(from: &[u8]) -> f32 {
        f32::from_le_bytes([from[0], from[1], from[2], from[3]])
    }
    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const f32) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load(from) }
    }
}

/// The upper half of a binary32; never subnormal.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct BrainFloat(u16);

// SAFETY: a plain number of two bytes.
unsafe impl Element for BrainFloat {
    const KIND: FloatType = FloatType::Bf16;

    #[inline(always)]
    fn round(value: f32) -> BrainFloat {
        BrainFloat(half::to_brain_float(value))
    }
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn write(self, to: &mut [u8]) {
        to.copy_from_slice(&self.0.to_le_bytes());
    }
    #[inline(always)]
    fn read(from: &[u8]) -> BrainFloat {
        BrainFloat(u16::from_le_bytes([from[0], from[1]]))
    }
    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const BrainFloat) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_brain(from.cast()) }
    }
}

/// IEEE binary16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Half(u16);

// SAFETY: a plain number of two bytes.
unsafe impl Element for Half {
    const KIND: FloatType = FloatType::F16;

    /// What is finite stays so: one infinite number would make the whole sequence useless.
    #[inline(always)]
    fn round(value: f32) -> Half {
        const LARGEST: f32 = 65504.0;
        Half(half::narrow(if value.is_finite() { value.clamp(-LARGEST, LARGEST) } else { value }))
    }
    #[inline(always)]
    fn value(self) -> f32 {
        half::widen(self.0)
    }
    #[inline(always)]
    fn write(self, to: &mut [u8]) {
        to.copy_from_slice(&self.0.to_le_bytes());
    }
    #[inline(always)]
    fn read(from: &[u8]) -> Half {
        Half(u16::from_le_bytes([from[0], from[1]]))
    }
    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const Half) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_half(from.cast()) }
    }
}

/// Calls `$body` with `$element` naming the element of `$kind`.
macro_rules! with_element {
    ($kind:expr, $element:ident => $body:expr) => {
        match $kind {
            FloatType::F32 => {
                type $element = f32;
                $body
            }
            FloatType::Bf16 => {
                type $element = BrainFloat;
                $body
            }
            FloatType::F16 => {
                type $element = Half;
                $body
            }
        }
    };
}

impl Kernels {
    /// Rounds every value to the nearest of type `kind`: ties to even; a bf16 that would be subnormal is zero, and for f16
    /// what is finite stays within ±65504.
    pub fn round_to(&self, kind: FloatType, values: &mut [f32]) {
        if kind == FloatType::F32 {
            return;
        }
        let len = values.len();
        let output = DisjointMut::new(values);
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            let values = unsafe { output.range(range) };
            with_element!(kind, E => self.dispatch(Round::<E> { values, element: PhantomData }));
        });
    }

    /// Writes `values`, rounded as [`Kernels::round_to`] does it, as little-endian elements of type `kind`.
    ///
    /// # Panics
    /// If `bytes` has not `kind.bytes()` bytes for each value.
    pub fn narrow(&self, kind: FloatType, values: &[f32], bytes: &mut [u8]) {
        let width = kind.bytes();
        assert_eq!(bytes.len(), values.len() * width, "an element for each value");
        let output = DisjointMut::new(bytes);
        self.for_ranges(values.len(), MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            let bytes = unsafe { output.range(range.start * width..range.end * width) };
            let values = &values[range];
            with_element!(kind, E => self.dispatch(Narrow::<E> { values, bytes, element: PhantomData }));
        });
    }

    /// Reads back what [`Kernels::narrow`] wrote: exactly.
    ///
    /// # Panics
    /// If `bytes` has not `kind.bytes()` bytes for each value.
    pub fn widen(&self, kind: FloatType, bytes: &[u8], values: &mut [f32]) {
        let (width, len) = (kind.bytes(), values.len());
        assert_eq!(bytes.len(), len * width, "an element for each value");
        let output = DisjointMut::new(values);
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            let bytes = &bytes[range.start * width..range.end * width];
            // SAFETY: the ranges of different tasks are disjoint.
            let values = unsafe { output.range(range) };
            with_element!(kind, E => self.dispatch(Widen::<E> { bytes, values, element: PhantomData }));
        });
    }
}

// The three loops use no lanes of their own: they are compiled for the instruction set, and simple enough for the compiler.

struct Round<'a, E> {
    values: &'a mut [f32],
    element: PhantomData<E>,
}

impl<E: Element> LaneKernel for Round<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for value in self.values {
            *value = E::round(*value).value();
        }
    }
}

struct Narrow<'a, E> {
    values: &'a [f32],
    bytes: &'a mut [u8],
    element: PhantomData<E>,
}

impl<E: Element> LaneKernel for Narrow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for (value, to) in self.values.iter().zip(self.bytes.chunks_exact_mut(size_of::<E>())) {
            E::round(*value).write(to);
        }
    }
}

struct Widen<'a, E> {
    bytes: &'a [u8],
    values: &'a mut [f32],
    element: PhantomData<E>,
}

impl<E: Element> LaneKernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for (from, value) in self.bytes.chunks_exact(size_of::<E>()).zip(self.values) {
            *value = E::read(from).value();
        }
    }
}
