//! Writing samples as a stream.

use super::{DatasetDigest, DatasetError, END_MAGIC, HEADER_BYTES, header};
use crate::example::Method;
use crate::sample::Sample;
use std::io::Write;

/// Writes samples one after another.
#[derive(Debug)]
pub struct DatasetWriter<W> {
    writer: W,
    hasher: blake3::Hasher,
    /// CRC of header and index.
    crc: crc32fast::Hasher,
    offset: u64,
    samples: u32,
    index: Vec<u8>,
    record: Vec<u8>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatasetSummary {
    /// Names the bytes.
    pub digest: DatasetDigest,
    /// How many samples there are.
    pub samples: u32,
    /// How many bytes.
    pub bytes: u64,
}

impl<W: Write> DatasetWriter<W> {
    /// Begins a dataset.
    pub fn new(writer: W, method: Method) -> Result<DatasetWriter<W>, DatasetError> {
        let mut new = DatasetWriter {
            writer,
            hasher: blake3::Hasher::new(),
            crc: crc32fast::Hasher::new(),
            offset: HEADER_BYTES as u64,
            samples: 0,
            index: Vec::new(),
            record: Vec::new(),
        };
        let header = header(method);
        new.crc.update(&header);
        new.put(&header)?;
        Ok(new)
    }

    /// Adds a sample.
    pub fn push(&mut self, sample: &Sample) -> Result<(), DatasetError> {
        let too_large = |_| DatasetError::TooLarge;
        let rows = u32::try_from(sample.rows()).map_err(too_large)?;
        let targets = u32::try_from(sample.target_count()).map_err(too_large)?;
        self.samples = self.samples.checked_add(1).ok_or(DatasetError::TooLarge)?;

        let mut record = std::mem::take(&mut self.record);
        record.clear();
        let mut number = |n: u32| record.extend_from_slice(&n.to_le_bytes());
        number(sample.example);
        number(sample.sequences.len() as u32);
        for sequence in &sample.sequences {
            // A sequence's rows fit 32 bits, so these do.
            number(sequence.tokens().len() as u32);
            number(sequence.targets().len() as u32);
            sequence.tokens().iter().for_each(|&token| number(token));
            sequence.targets().iter().for_each(|range| {
                number(range.start);
                number(range.end);
            });
        }
        let crc = crc32fast::hash(&record);
        record.extend_from_slice(&crc.to_le_bytes());
        let written = self.put(&record);
        self.offset += record.len() as u64;
        self.record = record;
        written?;

        self.index.extend_from_slice(&self.offset.to_le_bytes());
        for n in [sample.example, rows, targets] {
            self.index.extend_from_slice(&n.to_le_bytes());
        }
        Ok(())
    }

    /// Ends the dataset and returns what it was written to, flushed.
    pub fn finish(mut self) -> Result<(W, DatasetSummary), DatasetError> {
        let index = std::mem::take(&mut self.index);
        self.crc.update(&index);
        self.put(&index)?;
        let mut trailer = Vec::new();
        trailer.extend_from_slice(&self.offset.to_le_bytes());
        trailer.extend_from_slice(&self.samples.to_le_bytes());
        trailer.extend_from_slice(&self.crc.clone().finalize().to_le_bytes());
        trailer.extend_from_slice(&END_MAGIC);
        self.put(&trailer)?;
        self.writer.flush()?;
        let summary = DatasetSummary {
            digest: DatasetDigest(self.hasher.finalize().into()),
            samples: self.samples,
            bytes: self.offset + (index.len() + trailer.len()) as u64,
        };
        Ok((self.writer, summary))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), DatasetError> {
        self.hasher.update(bytes);
        Ok(self.writer.write_all(bytes)?)
    }
}
