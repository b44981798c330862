//! Memory for cached keys or values, in one of the types that a cache can hold.

use crate::aligned::AlignedBuffer;
use crate::elements::{BrainFloat, Element, Half};
use ashlar_vocabulary::FloatType;
use std::fmt;

/// The keys, or the values, of one layer: elements of one type, aligned to cache lines.
pub struct KvBuffer {
    kind: FloatType,
    elements: usize,
    data: AlignedBuffer,
}

impl KvBuffer {
    /// A buffer of `elements` zeros. Pages become resident when first written.
    pub fn zeroed(kind: FloatType, elements: usize) -> KvBuffer {
        KvBuffer { kind, elements, data: AlignedBuffer::zeroed((elements * kind.bytes()).div_ceil(4)) }
    }

    /// Type of the elements.
    pub fn kind(&self) -> FloatType {
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
            FloatType::F32 => self.elements_mut::<f32>().fill(value),
            FloatType::Bf16 => self.elements_mut::<BrainFloat>().fill(BrainFloat::round(value)),
            FloatType::F16 => self.elements_mut::<Half>().fill(Half::round(value)),
        }
    }

    /// The elements, which must be of type `E`.
    pub(super) fn elements<E: Element>(&self) -> &[E] {
        assert_eq!(self.kind, E::KIND, "the buffer's type");
        // SAFETY: the buffer has room for `elements` elements of `kind`, all initialised; every bit pattern is one, and
        // its alignment is a cache line.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.elements) }
    }

    /// The elements, to write.
    pub(super) fn elements_mut<E: Element>(&mut self) -> &mut [E] {
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
