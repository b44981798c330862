//! What is missing, in portions, and where what comes belongs.

use super::cache::SparseFile;
use ashlar_model::partial::{FileRanges, RangeSet};
use std::io;
use std::ops::Range;

/// What of `wanted` is not there.
pub(super) fn lacking(wanted: &FileRanges, files: &[SparseFile]) -> FileRanges {
    let of = |name: &str| files.iter().find(|file| file.path().file_name().is_some_and(|own| *own == *name));
    wanted
        .iter()
        .map(|(name, ranges)| {
            let lacks = of(name).map_or_else(|| ranges.clone(), |file| ranges.without(file.present()));
            (name.clone(), lacks)
        })
        .collect()
}

/// `ranges` in portions of so many bytes and ranges at most.
pub(super) fn batches(ranges: &RangeSet, (bytes_max, ranges_max): (u64, usize)) -> Vec<Vec<Range<u64>>> {
    let (mut batches, mut batch, mut room) = (Vec::new(), Vec::new(), bytes_max);
    for Range { mut start, end } in ranges.iter() {
        while start < end {
            let piece = start..end.min(start + room);
            (start, room) = (piece.end, room - (piece.end - piece.start));
            batch.push(piece);
            if room == 0 || batch.len() == ranges_max {
                batches.push(std::mem::take(&mut batch));
                room = bytes_max;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

/// Writes what came for a batch where it belongs.
pub(super) fn spread(batch: &[Range<u64>], bytes: &[u8], to: &mut SparseFile) -> io::Result<()> {
    let mut rest = bytes;
    for range in batch {
        let (piece, behind) = rest
            .split_at_checked((range.end - range.start) as usize)
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        to.write(range.start, piece)?;
        rest = behind;
    }
    Ok(())
}
