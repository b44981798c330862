//! One rank leaves rows for one other: a mailbox without a wait of its own.
//!
//! The ranks have a connection on which the reader asks and the writer says when it has posted; that also tells either that
//! the other is gone. So nothing is posted while the other still reads, and nobody looks into the mailbox in vain: here is
//! only what would otherwise travel as bytes through the connection. The number of posts and their label are checked all the
//! same, and reading what was posted is ordered after the writing by the stamp, not by the connection.

use crate::segment::{Geometry, GeometryError, Memory};
use std::sync::atomic::Ordering;

/// Rank 0 reads, rank 1 writes.
const WRITER: usize = 1;

/// Why nothing can be posted or taken; it cannot be gone on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MailboxError {
    /// More than fits, or no whole rows.
    #[error("{values} values in rows of {width} do not fit a mailbox of {room}")]
    Shape {
        /// Values to move.
        values: usize,
        /// Values of a row.
        width: usize,
        /// Room, in values.
        room: usize,
    },
    /// The other rank has posted something else, or not posted.
    #[error("the mailbox holds rows of another step or shape: lay the replica out anew")]
    Mismatch,
}

/// One rank's end of a mailbox.
#[derive(Debug)]
pub struct Mailbox {
    memory: Memory,
    /// Posts so far. Wraps.
    posts: u32,
}

impl Mailbox {
    /// How to cut memory for two ranks into a mailbox for `rows` rows of `width` values.
    pub fn geometry(rows: usize, width: usize) -> Result<Geometry, GeometryError> {
        let values = rows.saturating_mul(row_words(width)).saturating_mul(2);
        // Two slots for each of two ranks, all of which are the mailbox; of an even number of values each.
        Geometry::new(2, values.div_ceil(4).next_multiple_of(2))
    }

    /// Over memory that two ranks share, cut by [`Mailbox::geometry`]: rank 0's end takes, rank 1's posts.
    pub fn new(memory: Memory) -> Mailbox {
        Mailbox { memory, posts: 0 }
    }

    /// Length of the shared memory in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Leaves rows of `width` values each, over what was posted before.
    pub fn post(&mut self, label: u64, rows: &[f32], width: usize) -> Result<(), MailboxError> {
        self.check(rows.len(), width)?;
        for (index, row) in rows.chunks_exact(width).enumerate() {
            self.memory.segment.write_at(index * row_words(width), row);
        }
        let control = self.memory.segment.control(WRITER);
        control.contents[0].label.store(label, Ordering::Relaxed);
        control.contents[0].length.store(rows.len() as u64, Ordering::Relaxed);
        control.contents[1].length.store(width as u64, Ordering::Relaxed);
        self.posts = self.posts.wrapping_add(1);
        // Releases the rows: who acquires this stamp sees them.
        control.stamp.store(self.posts, Ordering::Release);
        Ok(())
    }

    /// Takes the next post, which must be `rows` rows of `width` values under this label.
    pub fn take(&mut self, label: u64, rows: usize, width: usize) -> Result<Post<'_>, MailboxError> {
        self.check(rows.saturating_mul(width), width)?;
        let control = self.memory.segment.control(WRITER);
        self.posts = self.posts.wrapping_add(1);
        let stamp = control.stamp.load(Ordering::Acquire);
        let found = control.contents[0].label.load(Ordering::Relaxed);
        let length = control.contents[0].length.load(Ordering::Relaxed);
        let wide = control.contents[1].length.load(Ordering::Relaxed);
        let shape = (length, wide) == ((rows * width) as u64, width as u64);
        let expected = stamp == self.posts && found == label && shape;
        expected.then_some(Post { memory: &self.memory, width }).ok_or(MailboxError::Mismatch)
    }

    fn check(&self, values: usize, width: usize) -> Result<(), MailboxError> {
        let room = self.memory.segment.geometry().values();
        let rows = values.checked_div(width).unwrap_or(0);
        let fits = width > 0 && values == rows * width && rows.saturating_mul(2 * row_words(width)) <= room;
        fits.then_some(()).ok_or(MailboxError::Shape { values, width, room })
    }
}

/// Rows that have been posted.
#[derive(Debug)]
pub struct Post<'m> {
    memory: &'m Memory,
    width: usize,
}

impl Post<'_> {
    /// Copies the first values of row `index`, as many as `row` has room for.
    pub fn read(&self, index: usize, row: &mut [f32]) {
        self.memory.segment.read_at(index * row_words(self.width), row);
    }
}

/// Every row begins with a word of its own.
fn row_words(width: usize) -> usize {
    width.div_ceil(2)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::segment::Segment;

    fn pair(rows: usize, width: usize) -> (Mailbox, Mailbox) {
        let geometry = Mailbox::geometry(rows, width).unwrap();
        let (segment, file) = Segment::create(geometry).unwrap();
        let other = Segment::open(&file, geometry).unwrap();
        let end = |segment, rank| Mailbox::new(Memory { segment, rank });
        (end(segment, 0), end(other, 1))
    }

    fn value(row: usize, column: usize) -> f32 {
        f32::from_bits(0x7fc0_0001 + (row * 1000 + column) as u32)
    }

    #[test]
    fn rows_of_any_width_arrive_bit_for_bit_wherever_they_are_put() {
        for width in [1, 2, 7, 64] {
            let (mut reader, mut writer) = pair(5, width);
            for (label, rows) in [(1, 5), (2, 1), (3, 4)] {
                let sent: Vec<f32> =
                    (0..rows * width).map(|index| value(index / width, index % width)).collect();
                writer.post(label, &sent, width).unwrap();
                let post = reader.take(label, rows, width).unwrap();
                for row in 0..rows {
                    let mut got = vec![0.0; width];
                    post.read(row, &mut got);
                    for (column, got) in got.iter().enumerate() {
                        assert_eq!(got.to_bits(), value(row, column).to_bits(), "{width} {row} {column}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_not_posted_cannot_be_taken() {
        let (mut reader, _writer) = pair(2, 3);
        assert_eq!(reader.take(1, 1, 3).unwrap_err(), MailboxError::Mismatch);
        for (label, rows, width) in [(2, 2, 3), (1, 1, 3), (1, 3, 2)] {
            let (mut reader, mut writer) = pair(3, 3);
            writer.post(1, &[1.0; 6], 3).unwrap();
            assert_eq!(reader.take(label, rows, width).unwrap_err(), MailboxError::Mismatch);
        }
        // Not twice either.
        let (mut reader, mut writer) = pair(2, 3);
        writer.post(1, &[1.0; 3], 3).unwrap();
        assert!(reader.take(1, 1, 3).is_ok());
        assert_eq!(reader.take(1, 1, 3).unwrap_err(), MailboxError::Mismatch);
    }

    #[test]
    fn more_than_fits_and_broken_rows_are_refused() {
        let (mut reader, mut writer) = pair(4, 64);
        for (values, width) in [(5 * 64, 64), (63, 64), (0, 0), (4 * 64 + 1, 4 * 64 + 1)] {
            let refused = writer.post(1, &vec![0.0; values], width).unwrap_err();
            assert!(matches!(refused, MailboxError::Shape { .. }), "{values} {width}");
        }
        assert!(matches!(reader.take(1, usize::MAX, 64), Err(MailboxError::Shape { .. })));
        assert!(Mailbox::geometry(usize::MAX, 64).is_err());
    }
}
