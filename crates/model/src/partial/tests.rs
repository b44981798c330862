//! Slices from files that hold nothing but what the plan says: the same bytes, for every format and cut.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::digest::model_digest;
use crate::source::Content;
use crate::synth::{SynthRequest, synthesize};
use crate::{Export, LoadError, ModelConfig, RankSlice, StageModel, WeightError, WeightFiles};
use ashlar_gguf::reader::{header_bytes, split_file_name};
use ashlar_gguf::writer::write_file;
use ashlar_gguf::{GgufFiles, GgufHeader, GgufWriteError, Value};
use ashlar_kernels::{Isa, Kernels, ThreadPool};
use ashlar_vocabulary::{FloatType, HeadSlice, LayerRange, ModelShape, Quantization};
use std::fs::{self, File};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":768,"num_hidden_layers":3,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,
    "vocab_size":VOCABULARY,"max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":TIED}"#;

fn synthesized(dtype: FloatType, tied: bool, vocabulary: usize) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let shape = directory.path().join("shape.json");
    let config = CONFIG.replace("TIED", &tied.to_string()).replace("VOCABULARY", &vocabulary.to_string());
    fs::write(&shape, config).unwrap();
    let shape = shape.to_string_lossy().into_owned();
    let request = SynthRequest { shape, dtype, seed: 5, tokenizer: None };
    synthesize(directory.path(), &request, &mut |_, _| {}).unwrap();
    directory
}

/// The same model as a GGUF file.
fn exported(model: &Path, quantization: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("small.gguf");
    let export = Export::open(model, quantization.parse().unwrap()).unwrap();
    export.write(&file, &[], &ThreadPool::new(1), &mut |_, _| ControlFlow::Continue(())).unwrap();
    (directory, file)
}

/// The same GGUF file as two, every second tensor in the second one.
fn split(file: &Path) -> TempDir {
    let whole = GgufFiles::open(file).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for number in 0..2usize {
        let mut header = GgufHeader::new();
        for (key, value) in whole.metadata().iter().filter(|_| number == 0) {
            header.metadata(key, value).unwrap();
        }
        let counts =
            [("split.no", number), ("split.count", 2), ("split.tensors.count", whole.tensors().len())];
        for (key, count) in counts {
            header.metadata(key, &Value::U32(count as u32)).unwrap();
        }
        let tensors: Vec<_> = whole.tensors().iter().skip(number).step_by(2).collect();
        for tensor in &tensors {
            header.tensor(&tensor.name, tensor.tensor_type, &tensor.dims).unwrap();
        }
        let path = directory.path().join(split_file_name("small", number as u64 + 1, 2));
        write_file(&path, &header, |writer| -> Result<(), GgufWriteError> {
            tensors.iter().try_for_each(|tensor| {
                let reader = whole.tensor(&tensor.name).unwrap();
                let bytes = reader.read_rows(0..tensor.rows()).unwrap();
                writer.tensor(&tensor.name, |sink| sink.write(&bytes))
            })
        })
        .unwrap();
    }
    directory
}

/// The small files whole, and of those with weights the headers and `wanted`.
fn sparse(model: &Path, wanted: &FileRanges) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let files = ModelFiles::of(model).unwrap();
    for file in files.files {
        let (from, to) = (files.folder.join(&file.name), directory.path().join(&file.name));
        if !file.weights {
            fs::copy(from, to).unwrap();
            continue;
        }
        let (source, out) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        out.set_len(file.bytes).unwrap();
        let header = if file.name.ends_with(".gguf") {
            header_bytes(&from).unwrap()
        } else {
            let mut prefix = [0; 8];
            source.read_exact_at(&mut prefix, 0).unwrap();
            8 + u64::from_le_bytes(prefix)
        };
        let mut present: RangeSet = [0..header].into_iter().collect();
        present.extend(wanted.get(&file.name).into_iter().flat_map(RangeSet::iter));
        for Range { start, end } in present.iter() {
            let mut bytes = vec![0; (end - start) as usize];
            source.read_exact_at(&mut bytes, start).unwrap();
            out.write_all_at(&bytes, start).unwrap();
        }
        write_present(&to, &present).unwrap();
    }
    directory
}

fn load(
    model: &Path,
    slice: &RankSlice,
    quantization: Option<Quantization>,
) -> Result<StageModel, LoadError> {
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    StageModel::load(model, quantization, slice.clone(), kernels, &mut |_, _| {})
}

/// All that a slice holds, as bytes under names.
fn packed(model: &StageModel) -> Vec<(String, Vec<u8>)> {
    let bytes = |content: Content<'_>| match content {
        Content::Matrix(matrix) => matrix.stored().flat_map(|segment| segment.bytes.to_vec()).collect(),
        Content::Vector(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Content::Table { bytes, .. } => bytes.to_vec(),
    };
    model.contents().into_iter().map(|(name, content)| (name, bytes(content))).collect()
}

/// Every slice of cuts in one to three stages of one or two ranks, with the head on the last stage or on all.
fn slices(shape: &ModelShape) -> Vec<RankSlice> {
    let mut slices = Vec::new();
    for (stages, ranks, spread) in
        [(1, 1, false), (3, 1, false), (1, 2, false), (3, 2, false), (2, 1, true), (2, 2, true)]
    {
        for (stage, tensor_rank) in (0..stages).flat_map(|stage| (0..ranks).map(move |rank| (stage, rank))) {
            let layers = shape.num_layers;
            slices.push(RankSlice {
                layers: LayerRange { start: stage * layers / stages, end: (stage + 1) * layers / stages },
                first: stage == 0,
                last: stage + 1 == stages,
                tensor_rank,
                tensor_parallel_size: ranks,
                head: HeadSlice::of_rank(spread, (stage, stages), (tensor_rank, ranks)),
            });
        }
    }
    slices
}

/// Checks every slice of `model`: its bytes are those from the whole files, and nothing of its ranges can be left out.
fn assert_slices(model: &Path, quantization: Option<&str>, what: &str) {
    let quantization: Option<Quantization> = quantization.map(|name| name.parse().unwrap());
    let shape = ModelConfig::open(model, quantization).unwrap().shape;
    let nothing = sparse(model, &FileRanges::new());
    for slice in slices(&shape) {
        let what = format!("{what}, {slice:?}");
        let wanted = slice_ranges(nothing.path(), quantization, &slice).unwrap();
        assert_eq!(wanted, slice_ranges(model, quantization, &slice).unwrap(), "{what}: headers suffice");
        let part = sparse(model, &wanted);
        let expected = packed(&load(model, &slice, quantization).unwrap());
        assert!(packed(&load(part.path(), &slice, quantization).unwrap()) == expected, "{what}");
        let (file, ranges) = wanted.iter().find(|(_, ranges)| !ranges.is_empty()).unwrap();
        let first = ranges.iter().next().unwrap();
        let lacking = ranges.without(&[first.end - 1..first.end].into_iter().collect());
        write_present(&part.path().join(file), &lacking).unwrap();
        let error = load(part.path(), &slice, quantization).unwrap_err();
        assert!(matches!(error, LoadError::Weights(WeightError::NotFetched { .. })), "{what}: {error}");
    }
}

#[test]
fn slices_of_safetensors_load_from_their_ranges_alone() {
    for tied in [false, true] {
        let model = synthesized(FloatType::Bf16, tied, 384);
        for quantization in [None, Some("q4_k_m")] {
            assert_slices(model.path(), quantization, &format!("tied {tied}, {quantization:?}"));
        }
    }
}

#[test]
fn slices_of_every_architecture_and_of_shards_load_from_their_ranges_alone() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    for name in ["llama-sharded", "llama-bias", "qwen2", "qwen3", "mistral"] {
        let model = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(goldens.join(name)).unwrap().flatten() {
            fs::copy(entry.path(), model.path().join(entry.file_name())).unwrap();
        }
        assert_slices(model.path(), None, name);
    }
}

#[test]
fn slices_of_gguf_files_load_from_their_ranges_alone() {
    for tied in [false, true] {
        let model = synthesized(FloatType::F32, tied, 384);
        for quantization in ["q8_0", "q4_k_m"] {
            // Rows of query and key are interleaved in these files.
            let (_folder, file) = exported(model.path(), quantization);
            let what = format!("tied {tied}, {quantization}");
            assert_slices(&file, None, &what);
            assert_slices(split(&file).path(), None, &format!("{what}, split"));
        }
    }
}

#[test]
fn a_slice_takes_little_more_than_its_share() {
    let model = synthesized(FloatType::F32, false, 384);
    let shape = ModelConfig::from_dir(model.path()).unwrap().shape;
    let bytes = |slice: &RankSlice| -> u64 {
        slice_ranges(model.path(), None, slice).unwrap().values().map(RangeSet::bytes).sum()
    };
    let whole = RankSlice::whole(&shape);
    let middle =
        RankSlice { layers: LayerRange { start: 1, end: 2 }, first: false, last: false, head: None, ..whole };
    // Two norms, four attention matrices, three of the feed-forward.
    let (hidden, keys, wide) = (256, 128, 768);
    let layer = 4 * (2 * hidden + 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide);
    assert_eq!(bytes(&middle), layer);
    // Rows are halved, what is cut by columns comes whole.
    let half = RankSlice { tensor_rank: 1, tensor_parallel_size: 2, ..middle };
    let rows = hidden * hidden + 2 * hidden * keys + 2 * hidden * wide;
    let columns = hidden * hidden + hidden * wide;
    assert_eq!(bytes(&half), 4 * (2 * hidden + rows / 2 + columns));
}

#[test]
fn what_names_a_model_suffices_for_its_digest() {
    let model = synthesized(FloatType::F32, false, 8192);
    let (_folder, file) = exported(model.path(), "q8_0");
    for path in [model.path(), &file] {
        let wanted = identity_ranges(path).unwrap();
        let part = sparse(path, &wanted);
        assert_eq!(model_digest(part.path(), None).unwrap(), model_digest(path, None).unwrap());
    }
    let whole: u64 = ModelFiles::of(model.path()).unwrap().files.iter().map(|file| file.bytes).sum();
    let sampled: u64 = identity_ranges(model.path()).unwrap().values().map(RangeSet::bytes).sum();
    assert!(sampled < whole / 10, "{sampled} of {whole} bytes");
}

#[test]
fn headers_are_asked_for_until_they_are_there() {
    let model = synthesized(FloatType::F32, false, 384);
    let (_folder, gguf) = exported(model.path(), "q8_0");
    for whole in [model.path().join("model.safetensors"), gguf] {
        let (source, bytes) = (File::open(&whole).unwrap(), fs::metadata(&whole).unwrap().len());
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join(whole.file_name().unwrap());
        let out = File::create(&part).unwrap();
        out.set_len(bytes).unwrap();
        let mut have = 0;
        while let Some(needed) = header_needed(&part, have).unwrap() {
            assert!(needed > have && needed <= bytes);
            let mut more = vec![0; (needed - have) as usize];
            source.read_exact_at(&mut more, have).unwrap();
            out.write_all_at(&more, have).unwrap();
            have = needed;
        }
        write_present(&part, &[0..have].into_iter().collect()).unwrap();
        // A GGUF file is opened by itself, safetensors by their folder.
        let opened = if part.extension().unwrap() == "gguf" { &part } else { &folder.path().to_owned() };
        WeightFiles::open(opened).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("a.safetensors", [255; 64]), ("a.gguf", [255; 64])] {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        assert!(header_needed(&path, 64).is_err(), "{name}");
    }
}
