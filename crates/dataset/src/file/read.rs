//! Reading samples by index.

use super::{
    DatasetError, END_MAGIC, HEADER_BYTES, INDEX_ENTRY_BYTES, MAGIC, SampleSize, TRAILER_BYTES, VERSION,
};
use crate::example::Method;
use crate::sample::{Sample, TokenSequence};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

/// Reads samples of a dataset in any order. Everything that is read is checked: a flipped bit is an error.
#[derive(Debug)]
pub struct DatasetReader<R> {
    reader: R,
    method: Method,
    /// Where each record ends.
    ends: Vec<u64>,
    sizes: Vec<SampleSize>,
}

impl<R: Read + Seek> DatasetReader<R> {
    /// Reads the index.
    pub fn open(mut reader: R) -> Result<DatasetReader<R>, DatasetError> {
        let length = reader.seek(SeekFrom::End(0))?;
        let frame = (HEADER_BYTES + TRAILER_BYTES) as u64;
        if length < frame {
            return Err(DatasetError::Damaged { what: "it is cut off" });
        }
        let mut header = [0; HEADER_BYTES];
        reader.seek(SeekFrom::Start(0))?;
        reader.read_exact(&mut header)?;
        if header[..8] != MAGIC || header[8..12] != VERSION.to_le_bytes() {
            return Err(DatasetError::Version);
        }
        let mut trailer = [0; TRAILER_BYTES];
        reader.seek(SeekFrom::Start(length - TRAILER_BYTES as u64))?;
        reader.read_exact(&mut trailer)?;
        if trailer[16..] != END_MAGIC {
            return Err(DatasetError::Damaged { what: "it is cut off" });
        }
        let mut fields = Fields { bytes: &trailer };
        let (Some(index_at), Some(samples), Some(crc)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Err(DatasetError::Damaged { what: "its trailer" });
        };
        // Only what is really there is allocated.
        let index_bytes = u64::from(samples) * INDEX_ENTRY_BYTES as u64;
        if index_at.checked_add(index_bytes) != Some(length - TRAILER_BYTES as u64) {
            return Err(DatasetError::Damaged { what: "its trailer" });
        }
        let mut index = vec![0; index_bytes as usize];
        reader.seek(SeekFrom::Start(index_at))?;
        reader.read_exact(&mut index)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header);
        hasher.update(&index);
        let method = match header[12] {
            0 => Method::Supervised,
            1 => Method::Dpo,
            _ => return Err(DatasetError::Damaged { what: "its header" }),
        };
        if hasher.finalize() != crc {
            return Err(DatasetError::Damaged { what: "its index" });
        }
        let mut dataset = DatasetReader { reader, method, ends: Vec::new(), sizes: Vec::new() };
        dataset.take_index(&index, index_at).ok_or(DatasetError::Damaged { what: "its index" })?;
        Ok(dataset)
    }

    fn take_index(&mut self, index: &[u8], index_at: u64) -> Option<()> {
        let mut before = HEADER_BYTES as u64;
        for entry in index.chunks_exact(INDEX_ENTRY_BYTES) {
            let mut fields = Fields { bytes: entry };
            let end = fields.u64()?;
            let size = SampleSize { example: fields.u32()?, rows: fields.u32()?, targets: fields.u32()? };
            if end <= before || self.sizes.last().is_some_and(|last| last.example > size.example) {
                return None;
            }
            before = end;
            self.ends.push(end);
            self.sizes.push(size);
        }
        (before == index_at).then_some(())
    }

    /// What the samples are for.
    pub fn method(&self) -> Method {
        self.method
    }

    /// How large each sample is: all that a plan needs.
    pub fn sizes(&self) -> &[SampleSize] {
        &self.sizes
    }

    /// Reads one sample.
    pub fn read(&mut self, index: u32) -> Result<Sample, DatasetError> {
        let at = index as usize;
        let (Some(&end), Some(size)) = (self.ends.get(at), self.sizes.get(at)) else {
            return Err(DatasetError::NoSuchSample { index, samples: self.sizes.len() as u32 });
        };
        let start = at.checked_sub(1).map_or(HEADER_BYTES as u64, |before| self.ends[before]);
        // Within the file, as the index was checked against its length.
        let mut record = vec![0; (end - start) as usize];
        self.reader.seek(SeekFrom::Start(start))?;
        self.reader.read_exact(&mut record)?;
        let damaged = DatasetError::Damaged { what: "a sample" };
        let Some((body, crc)) = record.split_last_chunk::<4>() else { return Err(damaged) };
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(damaged);
        }
        let sample = decode(body).ok_or(damaged)?;
        let fits = sample.example == size.example
            && sample.rows() == u64::from(size.rows)
            && sample.target_count() == u64::from(size.targets);
        if fits { Ok(sample) } else { Err(DatasetError::Damaged { what: "a sample" }) }
    }
}

fn decode(body: &[u8]) -> Option<Sample> {
    let mut fields = Fields { bytes: body };
    let (example, count) = (fields.u32()?, fields.u32()?);
    let mut sequences = Vec::new();
    for _ in 0..count {
        let (tokens, ranges) = (fields.u32()?, fields.u32()?);
        let tokens = fields.numbers(tokens as usize)?;
        let ranges = fields.numbers((ranges as usize).checked_mul(2)?)?;
        let ranges: Vec<Range<u32>> = ranges.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        sequences.push(TokenSequence::new(tokens, ranges)?);
    }
    fields.bytes.is_empty().then_some(Sample { example, sequences })
}

/// Numbers taken from the front of some bytes.
struct Fields<'b> {
    bytes: &'b [u8],
}

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (number, rest) = self.bytes.split_first_chunk::<4>()?;
        self.bytes = rest;
        Some(u32::from_le_bytes(*number))
    }

    fn u64(&mut self) -> Option<u64> {
        let (number, rest) = self.bytes.split_first_chunk::<8>()?;
        self.bytes = rest;
        Some(u64::from_le_bytes(*number))
    }

    /// Allocates only for bytes that are there.
    fn numbers(&mut self, count: usize) -> Option<Vec<u32>> {
        let (numbers, rest) = self.bytes.split_at_checked(count.checked_mul(4)?)?;
        self.bytes = rest;
        Some(numbers.chunks_exact(4).map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]])).collect())
    }
}
