//! The shared memory: a sealed memory file, mapped, seen only as atomics.
//!
//! Layout: one [`Control`] per rank, then two slots of values per rank. Both sides compute it from the same [`Geometry`]. A
//! mailbox takes all slots for one.

use crate::RANKS_MAX;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Most values of a slot; a peer that announces more is refused.
const SLOT_VALUES_MAX: usize = 1 << 22;
/// Slots per rank: a rank may fill one while a slower one still reads the other.
pub(crate) const BUFFERS: usize = 2;

/// How the memory is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    ranks: usize,
    slot_values: usize,
}

/// Ranks or values out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot share memory among {ranks} ranks with slots of {slot_values} values: take 2 to {RANKS_MAX} ranks, and an even \
     number of values up to {SLOT_VALUES_MAX}"
)]
pub struct GeometryError {
    ranks: usize,
    slot_values: usize,
}

impl Geometry {
    /// `ranks` ranks (2 to [`RANKS_MAX`]) with slots of `slot_values` values (even).
    pub fn new(ranks: usize, slot_values: usize) -> Result<Geometry, GeometryError> {
        let fits = (2..=RANKS_MAX).contains(&ranks)
            && (2..=SLOT_VALUES_MAX).contains(&slot_values)
            && slot_values.is_multiple_of(2);
        fits.then_some(Geometry { ranks, slot_values }).ok_or(GeometryError { ranks, slot_values })
    }

    /// Ranks.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// Values of a slot.
    pub fn slot_values(self) -> usize {
        self.slot_values
    }

    /// Where the slots begin, in bytes.
    fn slots_at(self) -> usize {
        self.ranks * size_of::<Control>()
    }

    /// Values of all slots together.
    pub fn values(self) -> usize {
        self.ranks * BUFFERS * self.slot_values
    }

    fn slot_words(self) -> usize {
        self.slot_values / 2
    }

    /// Length of the memory in bytes.
    pub fn bytes(self) -> usize {
        self.slots_at() + self.values() / 2 * size_of::<u64>()
    }
}

/// What a rank tells the others beside its values. Padded, so that no two ranks write to one cache line; 128 bytes because
/// processors fetch lines in pairs.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Control {
    /// What each slot holds. Beside the stamp, so that one cache miss brings everything but the values.
    pub(crate) contents: [Contents; BUFFERS],
    /// The exchange that this rank has entered. Written by it alone.
    pub(crate) stamp: AtomicU32,
    pub(crate) sleep: Sleep,
}

/// Names the values in a slot.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Contents {
    pub(crate) label: AtomicU64,
    pub(crate) length: AtomicU64,
}

/// How a sleeping rank is woken; on a line of its own, which changes only when somebody sleeps.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Sleep {
    /// Not 0 while the rank sleeps or is about to.
    pub(crate) asleep: AtomicU32,
    /// Changes with every ring; the rank sleeps on this word.
    pub(crate) bell: AtomicU32,
}

/// A rank's end of memory that has been handed over; what it is used for is the ranks' agreement.
#[derive(Debug)]
pub struct Memory {
    pub(crate) segment: Segment,
    pub(crate) rank: usize,
}

impl Memory {
    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.segment.geometry().bytes()
    }
}

/// The mapped memory of a group.
#[derive(Debug)]
pub(crate) struct Segment {
    base: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: the memory is only ever seen as atomics, through shared references; the mapping ends with the last owner.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// New memory, all zero, and the file that others map it from.
    pub(crate) fn create(geometry: Geometry) -> io::Result<(Segment, OwnedFd)> {
        let bytes = geometry.bytes() as u64;
        let file = rustix::fs::memfd_create("ashlar-group", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, bytes)?;
        // Pages are taken now: without memory this is an error here instead of a SIGBUS at the first touch.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Segment::map(file.as_fd(), geometry)?, file))
    }

    /// Maps memory that another rank has created. Refused unless it has the right length and can never shrink.
    pub(crate) fn open(file: &OwnedFd, geometry: Geometry) -> io::Result<Segment> {
        let refused = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
        // Sealed first, measured afterwards: what is sealed against shrinking keeps the length that is measured then.
        let seals = rustix::fs::fcntl_get_seals(file).map_err(|_| refused("not a memory file"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL) {
            return Err(refused("the memory could shrink under its readers"));
        }
        if usize::try_from(rustix::fs::fstat(file)?.st_size) != Ok(geometry.bytes()) {
            return Err(refused("the memory has another length than was announced"));
        }
        Segment::map(file.as_fd(), geometry)
    }

    fn map(file: BorrowedFd<'_>, geometry: Geometry) -> io::Result<Segment> {
        let (access, how) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing. The file is sealed and at least
        // `bytes` long (both callers have made sure), so that no access within can fault.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), geometry.bytes(), access, how, file, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Segment { base, geometry })
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The control block of a rank, below [`Geometry::ranks`].
    pub(crate) fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.geometry.ranks, "a rank of this group");
        // SAFETY: within the mapping, whose pages are aligned to more than a control block, and which lives as long as
        // `self`. A control block is atomics, valid for any bits, so that what other processes write is no data race.
        unsafe { self.base.cast::<Control>().add(rank).as_ref() }
    }

    /// All slots, two values to a word.
    fn words(&self) -> &[AtomicU64] {
        let words = self.geometry.values() / 2;
        // SAFETY: within the mapping by the geometry's own arithmetic; slots begin at a multiple of 8, since control blocks
        // are; lives as long as `self`. Atomics are valid for any bits and may be written by other processes.
        unsafe {
            std::slice::from_raw_parts(
                self.base.add(self.geometry.slots_at()).cast::<AtomicU64>().as_ptr(),
                words,
            )
        }
    }

    fn slot(&self, rank: usize, buffer: usize) -> &[AtomicU64] {
        assert!(rank < self.geometry.ranks && buffer < BUFFERS, "a slot of this group");
        let words = self.geometry.slot_words();
        &self.words()[(rank * BUFFERS + buffer) * words..][..words]
    }

    /// Copies values, at most a slot's, into a slot. Visible to whoever has seen a stamp that is raised afterwards.
    pub(crate) fn write(&self, rank: usize, buffer: usize, values: &[f32]) {
        store(self.slot(rank, buffer), values);
    }

    /// Copies the first values of a slot, at most a slot's.
    pub(crate) fn read(&self, rank: usize, buffer: usize, values: &mut [f32]) {
        load(self.slot(rank, buffer), values);
    }

    /// Copies values to word `at` of all slots taken together and after it, as far as there is room.
    pub(crate) fn write_at(&self, at: usize, values: &[f32]) {
        store(self.words().get(at..).unwrap_or_default(), values);
    }

    /// Copies the values from word `at` of all slots taken together, as far as there are any.
    pub(crate) fn read_at(&self, at: usize, values: &mut [f32]) {
        load(self.words().get(at..).unwrap_or_default(), values);
    }
}

fn store(words: &[AtomicU64], values: &[f32]) {
    let (pairs, rest) = values.as_chunks::<2>();
    for (word, [low, high]) in words.iter().zip(pairs) {
        word.store(u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32, Ordering::Relaxed);
    }
    if let ([value], Some(word)) = (rest, words.get(pairs.len())) {
        word.store(u64::from(value.to_bits()), Ordering::Relaxed);
    }
}

fn load(words: &[AtomicU64], values: &mut [f32]) {
    let (pairs, rest) = values.as_chunks_mut::<2>();
    let whole = pairs.len();
    for (word, pair) in words.iter().zip(pairs) {
        let bits = word.load(Ordering::Relaxed);
        *pair = [f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32)];
    }
    if let ([value], Some(word)) = (rest, words.get(whole)) {
        *value = f32::from_bits(word.load(Ordering::Relaxed) as u32);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` has mapped; no reference into it outlives `self`. Failing would only leak it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.geometry.bytes()) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_one_mapping_writes_another_reads_bit_for_bit_in_every_slot() {
        let geometry = Geometry::new(3, 6).unwrap();
        let (one, file) = Segment::create(geometry).unwrap();
        let other = Segment::open(&file, geometry).unwrap();
        let value = |rank: usize, buffer: usize, index: usize| {
            f32::from_bits(0x7fc0_0001 + (rank * 100 + buffer * 10 + index) as u32)
        };
        for length in [0, 1, 5, 6] {
            for (rank, buffer) in (0..3).flat_map(|rank| (0..BUFFERS).map(move |buffer| (rank, buffer))) {
                let values: Vec<f32> = (0..length).map(|index| value(rank, buffer, index)).collect();
                one.write(rank, buffer, &values);
            }
            for (rank, buffer) in (0..3).flat_map(|rank| (0..BUFFERS).map(move |buffer| (rank, buffer))) {
                let mut values = vec![0.0; length];
                other.read(rank, buffer, &mut values);
                for (index, read) in values.iter().enumerate() {
                    assert_eq!(read.to_bits(), value(rank, buffer, index).to_bits());
                }
            }
        }
        one.control(2).stamp.store(7, Ordering::Release);
        assert_eq!(other.control(2).stamp.load(Ordering::Acquire), 7);
        drop(one);
        assert_eq!(other.control(2).stamp.load(Ordering::Acquire), 7);
    }

    #[test]
    fn memory_that_could_shrink_or_has_another_length_is_refused() {
        let geometry = Geometry::new(2, 64).unwrap();
        let file = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, geometry.bytes() as u64).unwrap();
        assert!(Segment::open(&file, geometry).unwrap_err().to_string().contains("shrink"));
        let (_segment, file) = Segment::create(geometry).unwrap();
        assert!(rustix::fs::ftruncate(&file, 0).is_err(), "the seal holds");
        let larger = Geometry::new(2, 66).unwrap();
        assert!(Segment::open(&file, larger).unwrap_err().to_string().contains("length"));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(Segment::open(&OwnedFd::from(reader), geometry).is_err());
    }

    #[test]
    fn a_geometry_out_of_range_is_refused() {
        for (ranks, values) in
            [(1, 64), (9, 64), (2, 0), (2, 63), (2, SLOT_VALUES_MAX + 2), (usize::MAX, usize::MAX)]
        {
            assert!(Geometry::new(ranks, values).is_err(), "{ranks} {values}");
        }
    }
}
