//! Whole files: what is written is read again, slices are the right ones, split models, and the two stories260K files.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_gguf::blocks::{dequantize, quantize};
use ashlar_gguf::reader::split_file_name;
use ashlar_gguf::writer::write_file;
use ashlar_gguf::{Array, GgufError, GgufFiles, GgufHeader, GgufWriteError, GgufWriter, TensorType, Value};
use std::fs;
use std::path::{Path, PathBuf};

fn wave(count: usize, phase: f32) -> Vec<f32> {
    (0..count).map(|at| (at as f32 * 0.37 + phase).sin()).collect()
}

fn blocks_of(tensor_type: TensorType, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    quantize(tensor_type, &wave(count, tensor_type.id() as f32), &mut bytes).unwrap();
    bytes
}

fn all_values() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", "llama".into()),
        ("a.u8", Value::U8(200)),
        ("a.i8", Value::I8(-3)),
        ("a.u16", Value::U16(60000)),
        ("a.i16", Value::I16(-30000)),
        ("a.u32", Value::U32(u32::MAX)),
        ("a.i32", Value::I32(i32::MIN)),
        ("a.u64", Value::U64(u64::MAX)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f32", Value::F32(1.5)),
        ("a.f64", Value::F64(0.1)),
        ("a.bool", Value::Bool(true)),
        ("a.empty", "".into()),
        ("b.strings", Value::Array(Array::Str(vec!["▁a".into(), String::new(), "ß".into()]))),
        ("b.floats", Value::Array(Array::F32(vec![0.5, -1.0]))),
        ("b.doubles", Value::Array(Array::F64(vec![0.5]))),
        ("b.u8", Value::Array(Array::U8(vec![1, 255]))),
        ("b.i8", Value::Array(Array::I8(vec![-1]))),
        ("b.u16", Value::Array(Array::U16(vec![7]))),
        ("b.i16", Value::Array(Array::I16(vec![-7]))),
        ("b.u32", Value::Array(Array::U32(vec![9, 10]))),
        ("b.i32", Value::Array(Array::I32(vec![1, -9]))),
        ("b.u64", Value::Array(Array::U64(vec![1 << 40]))),
        ("b.i64", Value::Array(Array::I64(vec![]))),
        ("b.bools", Value::Array(Array::Bool(vec![true, false]))),
        (
            "b.nested",
            Value::Array(Array::Array(vec![
                Array::I32(vec![1]),
                Array::Array(vec![Array::Str(vec!["x".into()])]),
            ])),
        ),
    ]
}

/// Every value type, and a matrix of every tensor type.
fn rich_file(path: &Path) {
    let mut header = GgufHeader::new();
    for (key, value) in all_values() {
        header.metadata(key, &value).unwrap();
    }
    for tensor_type in TensorType::ALL {
        header.tensor(tensor_type.name(), tensor_type, &[512, 3]).unwrap();
    }
    header.tensor("vector", TensorType::F32, &[5]).unwrap();
    header.tensor("experts", TensorType::Q8_0, &[32, 2, 3, 2]).unwrap();
    write_file(path, &header, |writer| -> Result<(), GgufWriteError> {
        for tensor_type in TensorType::ALL {
            writer.tensor(tensor_type.name(), |sink| -> Result<(), GgufWriteError> {
                let bytes = blocks_of(tensor_type, 512 * 3);
                assert_eq!(sink.bytes_left(), bytes.len() as u64);
                bytes.chunks(100).try_for_each(|piece| sink.write(piece))
            })?;
        }
        writer.tensor("vector", |sink| sink.write(&blocks_of(TensorType::F32, 5)))?;
        writer.tensor("experts", |sink| sink.write(&blocks_of(TensorType::Q8_0, 32 * 12)))
    })
    .unwrap();
    assert_eq!(fs::metadata(path).unwrap().len(), header.file_bytes());
}

#[test]
fn what_is_written_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rich.gguf");
    rich_file(&path);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no partial file is left");
    let files = GgufFiles::open(&path).unwrap();
    let read: Vec<(&str, Value)> = files.metadata().iter().map(|(key, value)| (key, value.clone())).collect();
    assert_eq!(read, all_values());
    for tensor_type in TensorType::ALL {
        let reader = files.tensor(tensor_type.name()).unwrap();
        let info = reader.info();
        assert_eq!((info.shape(), info.rows(), info.columns()), (vec![3, 512], 3, 512));
        let expected = blocks_of(tensor_type, 512 * 3);
        assert_eq!(reader.read_rows(0..3).unwrap(), expected);
        let mut values = vec![0.0; 512 * 3];
        dequantize(tensor_type, &expected, &mut values).unwrap();
        assert_eq!(reader.dequantize_rows(1..3).unwrap(), values[512..]);
    }
    assert_eq!(files.tensor("vector").unwrap().info().rows(), 1);
    let experts = files.tensor("experts").unwrap().info();
    assert_eq!((experts.shape(), experts.rows()), (vec![2, 3, 2, 32], 12));
    assert_eq!(files.tensors().len(), TensorType::ALL.len() + 2);
}

#[test]
fn slices_are_the_blocks_of_their_rows_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rich.gguf");
    rich_file(&path);
    let files = GgufFiles::open(&path).unwrap();
    let reader = files.tensor("q5_0").unwrap();
    let whole = reader.read_rows(0..3).unwrap();
    let row_bytes = reader.info().row_bytes();
    assert_eq!(reader.read_rows(1..2).unwrap(), whole[row_bytes..2 * row_bytes]);
    assert!(reader.read_rows(2..2).unwrap().is_empty());
    let mut blocks = vec![0; 4 * 22];
    reader.read_blocks(2, 5..9, &mut blocks).unwrap();
    assert_eq!(blocks, whole[2 * row_bytes + 5 * 22..2 * row_bytes + 9 * 22]);
    #[allow(clippy::reversed_empty_ranges, reason = "the point of the test")]
    for rows in [0..4, 3..5, 2..1, 0..usize::MAX, usize::MAX..usize::MAX] {
        assert!(matches!(reader.read_rows(rows.clone()), Err(GgufError::Range { .. })), "{rows:?}");
        assert!(matches!(reader.dequantize_rows(rows.clone()), Err(GgufError::Range { .. })), "{rows:?}");
    }
    assert!(matches!(reader.read_blocks(3, 0..1, &mut [0; 22]), Err(GgufError::Range { .. })));
    assert!(matches!(reader.read_blocks(usize::MAX, 0..1, &mut [0; 22]), Err(GgufError::Range { .. })));
    assert!(matches!(reader.read_blocks(0, 16..17, &mut [0; 22]), Err(GgufError::Range { .. })));
    assert!(matches!(reader.read_blocks(0, 0..1, &mut [0; 23]), Err(GgufError::Range { .. })));
    assert!(matches!(files.tensor("absent"), Err(GgufError::NoTensor { .. })));
}

#[test]
fn metadata_answers_for_every_type_that_holds_the_value() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rich.gguf");
    rich_file(&path);
    let files = GgufFiles::open(&path).unwrap();
    let metadata = files.metadata();
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.require::<u64>("a.u8").unwrap(), 200);
    assert_eq!(metadata.require::<i64>("a.i16").unwrap(), -30000);
    assert_eq!(metadata.require::<f32>("a.f64").unwrap(), 0.1);
    assert_eq!(metadata.require::<f64>("a.f32").unwrap(), 1.5);
    assert!(metadata.require::<bool>("a.bool").unwrap());
    assert_eq!(metadata.require::<&[String]>("b.strings").unwrap()[0], "▁a");
    assert_eq!(metadata.require::<Vec<u64>>("b.u32").unwrap(), [9, 10]);
    assert_eq!(metadata.require::<Vec<i32>>("b.i32").unwrap(), [1, -9]);
    assert_eq!(metadata.require::<&[f32]>("b.floats").unwrap(), [0.5, -1.0]);
    assert_eq!(metadata.get::<u64>("absent").unwrap(), None);
    assert!(matches!(metadata.require::<u64>("absent"), Err(GgufError::NoKey { .. })));
    for error in [
        metadata.get::<u64>("a.i8").unwrap_err(),
        metadata.get::<u32>("a.u64").unwrap_err(),
        metadata.get::<Vec<u32>>("b.i32").unwrap_err(),
        metadata.get::<&str>("a.bool").unwrap_err(),
    ] {
        assert!(matches!(error, GgufError::KeyType { .. }), "{error}");
    }
    let error = metadata.get::<u64>("a.i8").unwrap_err().to_string();
    assert!(
        error.contains("`a.i8`") && error.contains("the i8 -3: an integer that is not negative"),
        "{error}"
    );
}

/// Three files; the model's keys are in the first, a tensor in the second, two in the third.
fn split_model(
    directory: &Path,
    change: impl Fn(u64, &mut Vec<(&'static str, Value)>, &mut Vec<&'static str>),
) {
    for number in 0..3u64 {
        let mut entries = vec![
            ("split.no", Value::U16(number as u16)),
            ("split.count", Value::U16(3)),
            ("split.tensors.count", Value::I32(3)),
        ];
        let mut tensors = match number {
            0 => vec![],
            1 => vec!["first"],
            _ => vec!["second", "third"],
        };
        if number == 0 {
            entries.push(("general.architecture", "llama".into()));
        }
        change(number, &mut entries, &mut tensors);
        let mut header = GgufHeader::new();
        for (key, value) in entries {
            header.metadata(key, &value).unwrap();
        }
        for name in &tensors {
            header.tensor(name, TensorType::F32, &[8]).unwrap();
        }
        let path = directory.join(split_file_name("model", number + 1, 3));
        write_file(&path, &header, |writer| -> Result<(), GgufWriteError> {
            tensors
                .iter()
                .try_for_each(|name| writer.tensor(name, |sink| sink.write(&[name.len() as u8; 32])))
        })
        .unwrap();
    }
}

fn member(directory: &Path, number: u64) -> PathBuf {
    directory.join(split_file_name("model", number, 3))
}

#[test]
fn a_split_model_opens_by_any_of_its_files() {
    let directory = tempfile::tempdir().unwrap();
    split_model(directory.path(), |_, _, _| ());
    for number in 1..=3 {
        let files = GgufFiles::open(&member(directory.path(), number)).unwrap();
        assert_eq!(files.paths().count(), 3);
        assert_eq!(files.metadata().require::<&str>("general.architecture").unwrap(), "llama");
        let names: Vec<&str> = files.tensors().iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["first", "second", "third"]);
        assert_eq!(files.tensor("second").unwrap().info().file, 2);
        assert_eq!(files.tensor("second").unwrap().read_rows(0..1).unwrap(), [6; 32]);
    }
}

#[test]
fn split_models_that_do_not_belong_together_are_refused() {
    type Change = fn(u64, &mut Vec<(&'static str, Value)>, &mut Vec<&'static str>);
    let changes: [(&str, Change); 6] = [
        ("`split.count` is 4", |number, entries, _| {
            if number == 1 {
                entries[1].1 = Value::U16(4);
            }
        }),
        ("`split.no` is 1, its name demands 2", |number, entries, _| {
            if number == 2 {
                entries[0].1 = Value::U16(1);
            }
        }),
        ("its tensor `first` is in", |number, _, tensors| {
            if number == 2 {
                tensors[1] = "first";
            }
        }),
        ("`split.tensors.count` is 4, but the 3 files have 3", |_, entries, _| entries[2].1 = Value::I32(4)),
        ("at most 512", |_, entries, _| entries[1].1 = Value::U16(60000)),
        ("its name says 3 files, but its header does not", |_, entries, _| {
            entries.remove(1);
        }),
    ];
    for (expected, change) in changes {
        let directory = tempfile::tempdir().unwrap();
        split_model(directory.path(), change);
        let error = GgufFiles::open(&member(directory.path(), 1)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("model-0000"), "{error}");
    }
}

#[test]
fn a_missing_or_misnamed_file_of_a_split_model_is_named() {
    let directory = tempfile::tempdir().unwrap();
    split_model(directory.path(), |_, _, _| ());
    fs::remove_file(member(directory.path(), 2)).unwrap();
    let error = GgufFiles::open(&member(directory.path(), 1)).unwrap_err();
    assert!(
        matches!(&error, GgufError::Read { path, .. } if path.ends_with("model-00002-of-00003.gguf")),
        "{error}"
    );
    fs::copy(member(directory.path(), 3), member(directory.path(), 2)).unwrap();
    let error = GgufFiles::open(&member(directory.path(), 1)).unwrap_err().to_string();
    assert!(error.contains("`split.no` is 2, its name demands 1"), "{error}");
    let renamed = directory.path().join("renamed.gguf");
    fs::copy(member(directory.path(), 1), &renamed).unwrap();
    let error = GgufFiles::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("names that end in -00001-of-00003.gguf"), "{error}");
}

#[test]
fn an_unfinished_file_never_takes_the_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, b"before").unwrap();
    let mut header = GgufHeader::new();
    header.tensor("a", TensorType::F32, &[8]).unwrap();
    header.tensor("b", TensorType::F32, &[8]).unwrap();
    type Writer = GgufWriter<std::io::BufWriter<fs::File>>;
    type Fill = fn(&mut Writer) -> Result<(), GgufWriteError>;
    let fills: [(&str, Fill); 6] = [
        ("tensor `a` has no data yet", |_| Ok(())),
        ("tensor `b` has no data yet", |w| w.tensor("a", |sink| sink.write(&[0; 32]))),
        ("where `a` is due", |w| w.tensor("b", |sink| sink.write(&[0; 32]))),
        ("got 31 bytes of its 32", |w| w.tensor("a", |sink| sink.write(&[0; 31]))),
        ("got 33 bytes of its 32", |w| w.tensor("a", |sink| sink.write(&[0; 33]))),
        ("the end of the file is due", |w| {
            for name in ["a", "b", "c"] {
                w.tensor(name, |sink| sink.write(&[0; 32]))?;
            }
            Ok(())
        }),
    ];
    for (expected, fill) in fills {
        let error = write_file(&path, &header, fill).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }
}

#[test]
fn a_header_that_no_reader_would_take_is_refused() {
    let mut header = GgufHeader::new();
    header.metadata("key", &Value::U8(1)).unwrap();
    for (key, value) in [
        ("key", Value::U8(2)),
        ("", Value::U8(2)),
        ("general.alignment", Value::U32(0)),
        ("general.alignment", Value::U32(48)),
        ("general.alignment", Value::U64(32)),
    ] {
        assert!(matches!(header.metadata(key, &value), Err(GgufWriteError::Key { .. })), "{key}");
    }
    header.tensor("a", TensorType::Q4K, &[256]).unwrap();
    assert!(header.metadata("general.alignment", &Value::U32(64)).is_err());
    let long = "x".repeat(64);
    for (name, dims) in [
        ("a", &[256u64][..]),
        ("", &[256]),
        (&long, &[256]),
        ("b", &[]),
        ("b", &[0]),
        ("b", &[128]),
        ("b", &[256, 1, 1, 1, 1]),
        ("b", &[256, u64::MAX]),
    ] {
        let error = header.tensor(name, TensorType::Q4K, dims).unwrap_err();
        assert!(matches!(error, GgufWriteError::Tensor { .. }), "{error}");
    }
    header.tensor("b", TensorType::Q4K, &[256]).unwrap();
}

#[test]
fn the_alignment_is_the_headers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("aligned.gguf");
    let mut header = GgufHeader::new();
    header.metadata("general.alignment", &Value::U32(4096)).unwrap();
    header.tensor("a", TensorType::F32, &[1]).unwrap();
    header.tensor("b", TensorType::F32, &[1]).unwrap();
    let mut writer = GgufWriter::new(Vec::new(), &header).unwrap();
    writer.tensor("a", |sink| sink.write(&1f32.to_le_bytes())).unwrap();
    writer.tensor("b", |sink| sink.write(&2f32.to_le_bytes())).unwrap();
    fs::write(&path, writer.finish().unwrap()).unwrap();
    let files = GgufFiles::open(&path).unwrap();
    assert_eq!(files.tensors().iter().map(|info| info.offset).collect::<Vec<_>>(), [4096, 8192]);
    assert_eq!(files.tensor("b").unwrap().dequantize_rows(0..1).unwrap(), [2.0]);
}

#[test]
fn the_stories_files_agree_with_each_other() {
    let root = std::env::var_os("ASHLAR_SHARED_DATA")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data").into(), PathBuf::from);
    let folder = root.join("models/stories260K-gguf");
    if !folder.is_dir() {
        eprintln!("SKIPPED: {} is absent; set ASHLAR_SHARED_DATA to run this test", folder.display());
        return;
    }
    let full = GgufFiles::open(&folder.join("stories260K-f32.gguf")).unwrap();
    let small = GgufFiles::open(&folder.join("stories260K-q8_0.gguf")).unwrap();
    assert_eq!(full.metadata().require::<&str>("general.architecture").unwrap(), "llama");
    let tokens = full.metadata().require::<&[String]>("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 512);
    assert_eq!(full.metadata().require::<&[f32]>("tokenizer.ggml.scores").unwrap().len(), 512);
    assert_eq!(full.tensors().len(), small.tensors().len());
    let mut quantized = 0;
    for info in full.tensors() {
        let (exact, rounded) = (full.tensor(&info.name).unwrap(), small.tensor(&info.name).unwrap());
        assert_eq!(exact.info().shape(), rounded.info().shape(), "{}", info.name);
        assert_eq!(exact.info().tensor_type, TensorType::F32);
        let rows = 0..info.rows();
        let (exact, values) =
            (exact.dequantize_rows(rows.clone()).unwrap(), rounded.dequantize_rows(rows.clone()).unwrap());
        if rounded.info().tensor_type == TensorType::F32 {
            assert_eq!(exact, values, "{}", info.name);
            continue;
        }
        quantized += 1;
        for (exact, values) in exact.chunks(32).zip(values.chunks(32)) {
            let largest = exact.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (x, y) in exact.iter().zip(values) {
                // Half a step, and the rounding of the scale to f16 over 127 steps.
                assert!((x - y).abs() <= largest * (0.5 / 127.0 + 1.0 / 2048.0), "{}: {x} {y}", info.name);
            }
        }
        // The file was written by another implementation of the same rule.
        let mut ours = Vec::new();
        quantize(TensorType::Q8_0, &exact, &mut ours).unwrap();
        assert_eq!(ours, rounded.read_rows(rows).unwrap(), "{}", info.name);
    }
    assert!(quantized > 0);
}
