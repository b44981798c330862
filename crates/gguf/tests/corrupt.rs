//! Files that are not what they should be: cut off, changed, absurd. Opening them is an error that says where, and
//! never a panic, a long wait or a large allocation.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_gguf::{Array, GgufError, GgufFiles, GgufHeader, GgufWriter, TensorType, Value};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A small file of everything; its last byte belongs to the last tensor.
fn sound_file() -> Vec<u8> {
    let mut header = GgufHeader::new();
    header.metadata("general.architecture", &"llama".into()).unwrap();
    header.metadata("general.alignment", &Value::U32(32)).unwrap();
    header.metadata("llama.block_count", &Value::U32(1)).unwrap();
    header.metadata("flag", &Value::Bool(true)).unwrap();
    header.metadata("tokens", &Value::Array(Array::Str(vec!["a".into(), "b".into()]))).unwrap();
    header.metadata("nested", &Value::Array(Array::Array(vec![Array::U16(vec![1, 2])]))).unwrap();
    header.tensor("norm", TensorType::F32, &[3]).unwrap();
    header.tensor("weight", TensorType::Q8_0, &[32, 2]).unwrap();
    header.tensor("last", TensorType::F32, &[4, 2]).unwrap();
    let mut writer = GgufWriter::new(Vec::new(), &header).unwrap();
    writer.tensor("norm", |sink| sink.write(&[1; 12])).unwrap();
    writer.tensor("weight", |sink| sink.write(&[2; 68])).unwrap();
    writer.tensor("last", |sink| sink.write(&[3; 32])).unwrap();
    writer.finish().unwrap()
}

/// Opens `bytes` as a file, and reads every tensor if that succeeds.
fn open(path: &Path, bytes: &[u8]) -> Result<(), GgufError> {
    fs::write(path, bytes).unwrap();
    let files = GgufFiles::open(path)?;
    for info in files.tensors() {
        let reader = files.tensor(&info.name)?;
        reader.dequantize_rows(0..info.rows())?;
    }
    Ok(())
}

#[test]
fn a_file_cut_off_anywhere_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.gguf");
    let sound = sound_file();
    open(&path, &sound).unwrap();
    for length in 0..sound.len() {
        let error = open(&path, &sound[..length]).unwrap_err();
        assert!(error.to_string().contains("cut.gguf"), "{error}");
        assert!(matches!(error, GgufError::Corrupt { .. }), "cut at {length}: {error}");
    }
}

#[test]
fn a_changed_byte_never_panics_or_costs_much() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("changed.gguf");
    let sound = sound_file();
    let start = Instant::now();
    let header_bytes = sound.len() - 32 - 96 - 32;
    let mut refused = 0;
    for at in 0..header_bytes {
        for value in
            [0, 1, 2, 9, 0x7f, 0x80, 0xff, sound[at] ^ 1, sound[at] ^ 0x80, sound[at].wrapping_add(1)]
        {
            let mut changed = sound.clone();
            changed[at] = value;
            refused += usize::from(open(&path, &changed).is_err());
        }
    }
    assert!(refused > header_bytes, "only {refused} changes were noticed");
    assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
}

/// Puts a header together without any check.
#[derive(Default, Clone)]
struct Raw {
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

impl Raw {
    fn entry(mut self, key: &[u8], kind: u32, value: &[u8]) -> Raw {
        self.entries.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Raw {
        let mut info = string(name.as_bytes());
        info.extend((dims.len() as u32).to_le_bytes());
        info.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        info.extend(kind.to_le_bytes());
        info.extend(offset.to_le_bytes());
        self.tensors.push(info);
        self
    }

    fn data(mut self, bytes: usize) -> Raw {
        self.data = bytes;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        self.with_counts(self.tensors.len() as u64, self.entries.len() as u64)
    }

    fn with_counts(&self, tensors: u64, entries: u64) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        out.extend(self.entries.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }
}

fn refused(bytes: &[u8], expected: &str) {
    let directory = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let error = open(&directory.path().join("bad.gguf"), bytes).unwrap_err().to_string();
    assert!(error.contains(expected) && error.contains("bad.gguf"), "`{expected}` is not in: {error}");
    assert!(start.elapsed() < Duration::from_secs(10), "{error} took {:?}", start.elapsed());
}

#[test]
fn the_hand_made_header_is_sound() {
    let directory = tempfile::tempdir().unwrap();
    let raw = Raw::default().entry(b"k", 0, &[1]).tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 32).data(64);
    open(&directory.path().join("a.gguf"), &raw.bytes()).unwrap();
    // Version 2 has the same layout.
    let mut second = raw.bytes();
    second[4] = 2;
    open(&directory.path().join("b.gguf"), &second).unwrap();
}

#[test]
fn other_formats_versions_and_byte_orders_are_told_apart() {
    refused(b"ggjt\x03\0\0\0 and so on", "instead of `GGUF`");
    let mut bytes = Raw::default().bytes();
    for (version, expected) in [
        ([1, 0, 0, 0], "GGUF version 1, of before"),
        ([0, 0, 0, 3], "big-endian"),
        ([4, 0, 0, 0], "GGUF version 4: versions 2 and 3"),
        ([0, 0, 0, 0], "GGUF version 0"),
    ] {
        bytes[4..8].copy_from_slice(&version);
        refused(&bytes, expected);
    }
}

#[test]
fn absurd_counts_and_lengths_are_refused_before_anything_is_allocated() {
    let raw = Raw::default().entry(b"k", 0, &[1]).tensor("a", &[8], 0, 0).data(32);
    for count in [100, 1 << 32, 1 << 61, u64::MAX] {
        refused(&raw.with_counts(count, 1), "tensors needs");
        refused(&raw.with_counts(1, count), "metadata entries needs");
        let length = count.to_le_bytes();
        refused(&Raw::default().entry(b"k", 8, &length).bytes(), "the value of `k` needs");
        for kind in 0..=12u32 {
            let array = [&kind.to_le_bytes()[..], &length].concat();
            refused(&Raw::default().entry(b"k", 9, &array).bytes(), "the value of `k` needs");
        }
        let mut long_key = Raw::default().entry(b"k", 0, &[1]).bytes();
        long_key[24..32].copy_from_slice(&length);
        refused(&long_key, "a key needs");
    }
    refused(&Raw::default().entry(&vec![b'k'; 65536], 0, &[1]).bytes(), "65536 bytes, 1 to 65535");
}

#[test]
fn values_that_do_not_exist_are_refused() {
    refused(&Raw::default().entry(b"k", 13, &[1]).bytes(), "unknown value type 13");
    refused(&Raw::default().entry(b"k", 7, &[2]).bytes(), "a bool of 2");
    refused(&Raw::default().entry(b"\xff\xfe", 0, &[1]).bytes(), "byte 32: a key is not UTF-8");
    refused(&Raw::default().entry(b"k", 8, &string(b"a\xff")).bytes(), "`k` is not UTF-8");
    refused(&Raw::default().entry(b"", 0, &[1]).bytes(), "a key has 0 bytes");
    refused(&Raw::default().entry(b"k", 0, &[1]).entry(b"k", 0, &[2]).bytes(), "the key `k` appears twice");
    let mut deep = Vec::new();
    for _ in 0..5 {
        deep.extend([9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    deep.extend([0; 64]);
    refused(&Raw::default().entry(b"k", 9, &deep).bytes(), "deeper than 4");
    for alignment in [0u32, 3, 48, u32::MAX] {
        let raw = Raw::default().entry(b"general.alignment", 4, &alignment.to_le_bytes());
        refused(&raw.bytes(), &format!("`general.alignment` is {alignment}"));
    }
    refused(&Raw::default().entry(b"general.alignment", 8, &string(b"32")).bytes(), "is not a u32");
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let one = |dims: &[u64], kind| Raw::default().tensor("a", dims, kind, 0).data(64).bytes();
    refused(&one(&[], 0), "0 axes");
    refused(&one(&[1, 1, 1, 1, 1], 0), "5 axes");
    refused(&one(&[8, 0], 0), "an empty axis");
    refused(&one(&[1 << 32, 1 << 32], 0), "more elements than can be counted");
    refused(&one(&[1 << 62, 2], 0), "can be counted");
    refused(&one(&[1 << 62, 3], 0), "can be counted");
    refused(&one(&[u64::MAX; 4], 0), "can be counted");
    refused(&one(&[48], 8), "whole blocks of 32");
    refused(&one(&[32], 14), "whole blocks of 256");
    refused(&one(&[256], 17), "tensor `a` in");
    refused(&one(&[256], 17), "is IQ2_XS: supported are f32, f16, bf16, q8_0");
    refused(&one(&[256], 99), "of unknown type 99");
    refused(&Raw::default().tensor("", &[8], 0, 0).data(64).bytes(), "a tensor has no name");
}

#[test]
fn offsets_that_leave_the_file_or_overlap_are_refused() {
    let one = |offset| Raw::default().tensor("a", &[8], 0, offset).data(64).bytes();
    refused(&one(4), "no multiple of the alignment 32");
    refused(&one(64), "the file ends at");
    refused(&one(1 << 40), "the file ends at");
    refused(&one(u64::MAX - 31), "the file ends at");
    let two = |first, second| {
        Raw::default().tensor("a", &[16], 0, first).tensor("b", &[16], 0, second).data(256).bytes()
    };
    refused(&two(0, 0), "starts before");
    refused(&two(0, 32), "tensor `b` starts before `a` ends");
    refused(&two(64, 32), "tensor `a` starts before `b` ends");
    refused(&two(32, 32), "starts before");
    let twice = Raw::default().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64);
    refused(&twice.bytes(), "the tensor `a` appears twice");
    // Any order and gaps are harmless.
    let directory = tempfile::tempdir().unwrap();
    open(&directory.path().join("swapped.gguf"), &two(128, 0)).unwrap();
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let error = GgufFiles::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    assert!(GgufFiles::open(Path::new("/dev/null")).is_err());
    assert!(matches!(GgufFiles::open(&directory.path().join("absent")), Err(GgufError::Read { .. })));
    let fifo = directory.path().join("pipe.gguf");
    match std::process::Command::new("mkfifo").arg(&fifo).status() {
        Ok(status) if status.success() => {
            let error = GgufFiles::open(&fifo).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
        _ => eprintln!("SKIPPED: no mkfifo here, so a FIFO is not tried"),
    }
}

#[test]
fn a_file_that_shrinks_after_opening_is_a_read_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shrinking.gguf");
    let sound = sound_file();
    fs::write(&path, &sound).unwrap();
    let files = GgufFiles::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(sound.len() as u64 - 1).unwrap();
    let reader = files.tensor("last").unwrap();
    assert!(reader.read_rows(0..1).is_ok());
    assert!(matches!(reader.read_rows(0..2), Err(GgufError::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_headers_never_panic(
        tensors in 0u64..4,
        entries in 0u64..4,
        noise in prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => 0u8..14, 1 => any::<u8>()], 0..400),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(noise);
        let _ = open(&directory.path().join("noise.gguf"), &bytes);
    }

    #[test]
    fn several_changed_bytes_never_panic(changes in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = sound_file();
        for (at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let _ = open(&directory.path().join("changed.gguf"), &bytes);
    }
}
