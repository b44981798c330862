//! Memory for cached keys or values, in one of the types that a cache can hold.

use crate::aligned::AlignedBuffer;
use crate::half;
use crate::lanes::Simd16;
use ashlar_vocabulary::KvCacheType;
use std::fmt;

/// The keys, or the values, of one layer: elements of one type, aligned to cache lines.
pub struct KvBuffer {
    kind: KvCacheType,
    elements: usize,
    data: AlignedBuffer,
}

impl KvBuffer {
    /// A buffer of `elements` zeros. Pages become resident when first written.
    pub fn zeroed(kind: KvCacheType, elements: usize) -> KvBuffer {
        KvBuffer { kind, elements, data: AlignedBuffer::zeroed((elements * kind.bytes()).div_ceil(4)) }
    }

    /// Type of the elements.
    pub fn kind(&self) -> KvCacheType {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Memory of the elements.
    pub fn bytes(&self) -> usize {
        self.elements * self.kind.bytes()
    }

    /// Writes `value`, rounded to the buffer's type, to every element.
    pub fn fill(&mut self, value: f32) {
        match self.kind {
            KvCacheType::F32 => self.elements_mut::<f32>().fill(value),
            KvCacheType::Bf16 => self.elements_mut::<BrainFloat>().fill(BrainFloat::round(value)),
            KvCacheType::F16 => self.elements_mut::<Half>().fill(Half::round(value)),
        }
    }

    /// The elements, which must be of type `E`.
    pub(super) fn elements<E: CacheElement>(&self) -> &[E] {
        assert_eq!(self.kind, E::KIND, "the buffer's type");
        // SAFETY: the buffer has room for `elements` elements of `kind`, all initialised; every bit pattern is one, and
        // its alignment is a cache line.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.elements) }
    }

    /// The elements, to write.
    pub(super) fn elements_mut<E: CacheElement>(&mut self) -> &mut [E] {
        assert_eq!(self.kind, E::KIND, "the buffer's type");
        // SAFETY: as for `elements`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_mut_ptr().cast(), self.elements) }
    }
}

impl fmt::Debug for KvBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvBuffer({} × {})", self.elements, self.kind)
    }
}

/// An element of a cache.
///
/// # Safety
/// Implementors are plain numbers of `KIND.bytes()` bytes, aligned to no more, for which every bit pattern is valid.
pub(super) unsafe trait CacheElement: Copy + Sync + 'static {
    /// The type that it is an element of.
    const KIND: KvCacheType;

    /// The nearest element, ties to even.
    fn round(value: f32) -> Self;

    /// Its value.
    fn value(self) -> f32;

    /// Widens sixteen elements, exactly.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen elements; no alignment beyond the element's is needed.
    unsafe fn load<S: Simd16>(from: *const Self) -> S;
}

// SAFETY: a plain number of four bytes.
unsafe impl CacheElement for f32 {
    const KIND: KvCacheType = KvCacheType::F32;

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
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
pub(super) struct BrainFloat(u16);

// SAFETY: a plain number of two bytes.
unsafe impl CacheElement for BrainFloat {
    const KIND: KvCacheType = KvCacheType::Bf16;

    #[inline(always)]
    fn round(value: f32) -> BrainFloat {
        BrainFloat(half::to_brain_float(value))
    }
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
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
pub(super) struct Half(u16);

// SAFETY: a plain number of two bytes.
unsafe impl CacheElement for Half {
    const KIND: KvCacheType = KvCacheType::F16;

    /// What is finite stays so: an infinite key would make the whole sequence useless.
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
    unsafe fn load<S: Simd16>(from: *const Half) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_half(from.cast()) }
    }
}
