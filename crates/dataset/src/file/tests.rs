#![allow(clippy::unwrap_used)]

use super::*;
use crate::sample::{Sample, TokenSequence};
use std::io::Cursor;

fn samples() -> Vec<Sample> {
    let sequence = |tokens: Vec<u32>, targets| TokenSequence::new(tokens, targets).unwrap();
    vec![
        Sample { example: 0, sequences: vec![sequence(vec![1, 2, 3], vec![1..3])] },
        Sample { example: 0, sequences: vec![sequence(vec![4, 5], vec![1..2])] },
        Sample {
            example: 2,
            sequences: vec![
                sequence(vec![7; 50], vec![3..9, 40..50]),
                sequence(vec![u32::MAX, 0, 9], vec![2..3]),
            ],
        },
    ]
}

fn written(samples: &[Sample]) -> (Vec<u8>, DatasetSummary) {
    let mut writer = DatasetWriter::new(Vec::new(), Method::Dpo).unwrap();
    samples.iter().for_each(|sample| writer.push(sample).unwrap());
    writer.finish().unwrap()
}

#[test]
fn samples_are_read_back_in_any_order() {
    let samples = samples();
    let (bytes, summary) = written(&samples);
    assert_eq!((summary.samples, summary.bytes), (3, bytes.len() as u64));
    assert_eq!(summary.digest, DatasetDigest::of(&bytes[..]).unwrap());
    let mut reader = DatasetReader::open(Cursor::new(&bytes)).unwrap();
    assert_eq!(reader.method(), Method::Dpo);
    for index in [2, 0, 1, 2] {
        assert_eq!(reader.read(index).unwrap(), samples[index as usize]);
    }
    assert_eq!(reader.sizes()[2], SampleSize { example: 2, rows: 51, targets: 17 });
    assert!(matches!(reader.read(3), Err(DatasetError::NoSuchSample { index: 3, samples: 3 })));
    let (empty, _) = written(&[]);
    assert_eq!(DatasetReader::open(Cursor::new(&empty)).unwrap().sizes(), []);
}

#[test]
fn the_bytes_of_a_version_do_not_change() {
    let (_, summary) = written(&samples());
    // A change here is a change of the format: raise VERSION.
    assert_eq!(
        summary.digest.to_string(),
        "0742c47e446127d672461b3d4b42f08363f81b30a3b992e9714a82056524ff4e"
    );
}

#[test]
fn every_flipped_bit_is_noticed() {
    let samples = samples();
    let (bytes, _) = written(&samples);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let read = DatasetReader::open(Cursor::new(&damaged))
                .and_then(|mut reader| (0..3).map(|index| reader.read(index)).collect::<Result<Vec<_>, _>>());
            assert!(read.is_err(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn every_cut_is_noticed() {
    let (bytes, _) = written(&samples());
    for length in 0..bytes.len() {
        assert!(DatasetReader::open(Cursor::new(&bytes[..length])).is_err(), "{length}");
    }
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(tail in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let mut bytes = header(Method::Supervised).to_vec();
        bytes.extend(tail);
        let _ = DatasetReader::open(Cursor::new(&bytes));
        decode_any(&bytes);
    }
}

/// A record reached past its checksum.
fn decode_any(body: &[u8]) {
    let mut writer = DatasetWriter::new(Vec::new(), Method::Supervised).unwrap();
    writer.push(&samples()[0]).unwrap();
    let (mut bytes, _) = writer.finish().unwrap();
    // Replace the only record's body by as much of `body` as fits, with a right checksum.
    let record = HEADER_BYTES..bytes.len() - INDEX_ENTRY_BYTES - TRAILER_BYTES;
    let inner = record.start..record.end - 4;
    for (to, from) in bytes[inner.clone()].iter_mut().zip(body) {
        *to = *from;
    }
    let crc = crc32fast::hash(&bytes[inner.clone()]);
    bytes[inner.end..record.end].copy_from_slice(&crc.to_le_bytes());
    let _ = DatasetReader::open(Cursor::new(&bytes)).unwrap().read(0);
}
