//! Packed copies of slices: the same bits as the model's files, without reading them, and never anything else.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::{Isa, Kernels, ThreadPool};
use ashlar_model::digest::model_digest;
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{
    CachePlace, CopyReadError, CopyWriteError, Export, ModelConfig, Origin, PackedCopy, RankSlice, StageModel,
};
use ashlar_vocabulary::{Bytes, FloatType, ModelDigest, Quantization};
use common::{Grid, bits, goldens};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Heads, feed-forward and vocabulary can be cut four ways; parts of the feed-forward cut superblocks.
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":768,"num_hidden_layers":4,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,
    "vocab_size":384,"max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":TIED}"#;

fn synthesized(directory: &Path, dtype: FloatType, tied: bool) {
    let shape = directory.join("shape.json");
    fs::write(&shape, CONFIG.replace("TIED", &tied.to_string())).unwrap();
    let shape = shape.to_string_lossy().into_owned();
    synthesize(directory, &SynthRequest { shape, dtype, seed: 11, tokenizer: None }, &mut |_, _| {}).unwrap();
}

fn kernels() -> Arc<Kernels> {
    Arc::new(Kernels::new(Isa::best(), 2))
}

/// One model with its digest, and where its copies are kept.
struct Model {
    path: PathBuf,
    digest: ModelDigest,
    quantization: Option<Quantization>,
    place: CachePlace,
}

impl Model {
    fn new(path: &Path, quantization: Option<&str>) -> Model {
        let quantization = quantization.map(|name| name.parse().unwrap());
        let digest = model_digest(path, quantization).unwrap();
        Model { path: path.to_owned(), digest, quantization, place: CachePlace::BesideModel }
    }

    fn config(&self) -> ModelConfig {
        ModelConfig::open(&self.path, self.quantization).unwrap()
    }

    fn copy(&self, slice: RankSlice) -> PackedCopy {
        PackedCopy::new(&self.place, &self.path, &self.digest, self.quantization, slice)
    }

    fn whole(&self) -> PackedCopy {
        self.copy(RankSlice::whole(&self.config().shape))
    }

    /// Loads every rank as a node does: from its copy, or from the model's files and then writes the copy.
    fn grid(&self, stages: usize, ranks: usize, expected: Origin) -> Grid {
        Grid::of(self.config(), stages, ranks, false, &|slice| {
            let copy = self.copy(slice);
            let mut heard = (Bytes(0), Bytes(0));
            let mut progress = |ready, total| heard = (ready, total);
            let (model, origin) = copy.load_or_pack(&kernels(), &mut progress).unwrap();
            assert_eq!(origin, expected, "{}", copy.path().display());
            assert!(heard.0 == heard.1 && heard.1 > Bytes(0), "{heard:?}");
            if origin == Origin::Files {
                let written = copy.write(&model, &|| false).unwrap();
                assert_eq!(fs::metadata(copy.path()).unwrap().len(), written.0);
            }
            model
        })
    }
}

fn logits(grid: &mut Grid) -> Vec<Vec<u32>> {
    let vocabulary = grid.config.shape.vocab_size as u32;
    let prompt: Vec<u32> = (0..21).map(|i| (i * 53 + 7) % vocabulary).collect();
    grid.greedy(&prompt, 3).1.iter().map(|row| bits(row)).collect()
}

/// Checks that copies give `model`'s bits for these cuts, once the weight files are gone.
fn assert_copies_suffice(model: &Model, weights: &Path, cuts: &[(usize, usize)], what: &str) {
    let expected = logits(&mut Grid::quantized(&model.path, model.quantization, 1, 1, Isa::best(), 2));
    let first: Vec<u64> = cuts
        .iter()
        .map(|&(stages, ranks)| {
            let mut grid = model.grid(stages, ranks, Origin::Files);
            assert!(logits(&mut grid) == expected, "{what}, {stages} × {ranks}: packed");
            grid.weight_bytes()
        })
        .collect();
    fs::remove_file(weights).unwrap();
    for (&(stages, ranks), first) in cuts.iter().zip(first) {
        let mut grid = model.grid(stages, ranks, Origin::Copy);
        assert!(logits(&mut grid) == expected, "{what}, {stages} × {ranks}: from copies");
        assert_eq!(grid.weight_bytes(), first, "{what}, {stages} × {ranks}: as much memory");
    }
}

#[test]
fn copies_of_every_type_and_cut_give_the_same_bits_without_the_weights() {
    for tied in [true, false] {
        for name in ["f32", "bf16", "q8_0", "q4_0", "q4_k_m"] {
            let directory = tempfile::tempdir().unwrap();
            let dtype = if name == "bf16" { FloatType::Bf16 } else { FloatType::F32 };
            synthesized(directory.path(), dtype, tied);
            let model = Model::new(directory.path(), Some(name).filter(|name| name.starts_with('q')));
            let weights = directory.path().join("model.safetensors");
            assert_copies_suffice(&model, &weights, &[(1, 1), (2, 1), (1, 2), (2, 4)], name);
        }
    }
}

/// Copies the files of a golden model to a directory that may be written to.
fn golden(name: &str, to: &Path) {
    for file in ["config.json", "model.safetensors"] {
        fs::copy(goldens().join(name).join(file), to.join(file)).unwrap();
    }
}

#[test]
fn biases_and_norms_of_every_architecture_are_copied() {
    for name in ["llama-bias", "llama-f16", "qwen2", "qwen3", "mistral"] {
        let directory = tempfile::tempdir().unwrap();
        golden(name, directory.path());
        let model = Model::new(directory.path(), None);
        assert_copies_suffice(&model, &directory.path().join("model.safetensors"), &[(1, 1), (2, 2)], name);
    }
}

#[test]
fn a_gguf_files_copy_lies_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    synthesized(directory.path(), FloatType::F32, false);
    let file = directory.path().join("small-q4_k_m.gguf");
    let export = Export::open(directory.path(), "q4_k_m".parse().unwrap()).unwrap();
    export.write(&file, &[], &ThreadPool::new(2), &mut |_, _| ControlFlow::Continue(())).unwrap();
    let model = Model::new(&file, None);
    let expected = logits(&mut Grid::quantized(&file, None, 1, 1, Isa::best(), 2));
    for origin in [Origin::Files, Origin::Copy] {
        assert!(logits(&mut model.grid(1, 1, origin)) == expected, "{origin:?}");
    }
    let path = model.whole().path().to_owned();
    assert_eq!(path.parent().unwrap(), directory.path().join(".ashlar"));
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("small-q4_k_m.stored.layers-0-4.tp-0-of-1."), "{name}");
}

/// A small model, loaded from its files, and its copy as bytes.
fn small(directory: &Path) -> (Model, StageModel, Vec<u8>) {
    golden("llama-f16", directory);
    let model = Model::new(directory, None);
    let (loaded, _) = model.whole().load_or_pack(&kernels(), &mut |_, _| {}).unwrap();
    model.whole().write(&loaded, &|| false).unwrap();
    let bytes = fs::read(model.whole().path()).unwrap();
    (model, loaded, bytes)
}

#[test]
fn a_truncated_copy_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (model, _, bytes) = small(directory.path());
    let copy = model.whole();
    let near_the_ends = (0..256).chain(bytes.len() - 256..bytes.len());
    for length in near_the_ends.chain((0..bytes.len()).step_by(64 * 13)) {
        fs::write(copy.path(), &bytes[..length]).unwrap();
        let found = copy.load(&kernels(), &mut |_, _| {});
        assert!(matches!(found, Err(CopyReadError::Unusable(_))), "{length} of {} bytes", bytes.len());
    }
    fs::write(copy.path(), [&bytes[..], b"more"].concat()).unwrap();
    assert!(matches!(copy.load(&kernels(), &mut |_, _| {}), Err(CopyReadError::Unusable(_))));
    fs::write(copy.path(), &bytes).unwrap();
    assert!(copy.load(&kernels(), &mut |_, _| {}).is_ok());
}

#[test]
fn a_flipped_bit_never_shows_in_a_result() {
    let directory = tempfile::tempdir().unwrap();
    let (model, _, bytes) = small(directory.path());
    let copy = model.whole();
    let of = |loaded: StageModel| {
        let loaded = std::cell::RefCell::new(Some(loaded));
        logits(&mut Grid::of(model.config(), 1, 1, false, &|_| loaded.take().unwrap()))
    };
    let expected = of(copy.load(&kernels(), &mut |_, _| {}).unwrap());
    let (mut refused, mut unharmed) = (0, 0);
    let header_and_manifest = (0..128).chain((bytes.len() - 8192..bytes.len()).step_by(61));
    for at in header_and_manifest.chain((0..bytes.len()).step_by(331)) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(copy.path(), &damaged).unwrap();
        match copy.load(&kernels(), &mut |_, _| {}) {
            Err(CopyReadError::Unusable(_)) => refused += 1,
            // Between segments nothing is read.
            Ok(loaded) => {
                assert!(of(loaded) == expected, "a bit of byte {at} shows");
                unharmed += 1;
            }
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(refused > 200 && unharmed > 0, "{refused} refused, {unharmed} unharmed");
}

#[test]
fn what_cannot_be_trusted_is_packed_and_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (model, _, bytes) = small(directory.path());
    let path = model.whole().path().to_owned();
    let expected = logits(&mut model.grid(1, 1, Origin::Copy));
    let mut damaged = bytes.clone();
    damaged[4096] ^= 1;
    for found in [damaged, Vec::new(), b"{\"a\": \"foreign file\"}".repeat(100)] {
        fs::write(&path, found).unwrap();
        assert!(logits(&mut model.grid(1, 1, Origin::Files)) == expected);
        assert!(logits(&mut model.grid(1, 1, Origin::Copy)) == expected);
        assert!(fs::read(&path).unwrap() == bytes, "the same slice gives the same file");
    }
    // Another model's copy under this name.
    let other = Model { digest: ModelDigest([1; 32]), ..Model::new(directory.path(), None) };
    fs::write(other.whole().path(), &bytes).unwrap();
    let found = other.whole().load(&kernels(), &mut |_, _| {});
    assert!(matches!(found, Err(CopyReadError::Unusable(reason)) if reason.contains("another model")));
    // A directory under this name: no copy then, but the slice.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let (loaded, origin) = model.whole().load_or_pack(&kernels(), &mut |_, _| {}).unwrap();
    assert_eq!(origin, Origin::Files);
    assert!(matches!(model.whole().write(&loaded, &|| false), Err(CopyWriteError::Failed { .. })));
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_place_that_cannot_be_written_to_is_an_error_that_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let (model, loaded, _) = small(directory.path());
    // Not even a privileged user makes a directory below a file.
    let place = CachePlace::Directory(directory.path().join("config.json").join("cache"));
    let copy = Model { place, ..model }.whole();
    let error = copy.write(&loaded, &|| false).unwrap_err().to_string();
    assert!(error.contains("--cache=DIR") && error.contains("Serving goes on"), "{error}");
    assert_eq!(copy.load_or_pack(&kernels(), &mut |_, _| {}).unwrap().1, Origin::Files);
}

#[test]
fn a_stopped_or_failed_writer_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let (model, loaded, _) = small(directory.path());
    let cache = tempfile::tempdir().unwrap();
    let model = Model { place: CachePlace::Directory(cache.path().to_owned()), ..model };
    let asked = std::cell::Cell::new(0);
    let stop = || asked.replace(asked.get() + 1) == 7;
    assert!(matches!(model.whole().write(&loaded, &stop), Err(CopyWriteError::Stopped)));
    assert_eq!(names(cache.path()), [""; 0]);
}

#[test]
fn a_new_copy_replaces_those_before_it_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (model, loaded, _) = small(directory.path());
    let cache = tempfile::tempdir().unwrap();
    let model = Model { place: CachePlace::Directory(cache.path().to_owned()), ..model };
    let before =
        Model { digest: ModelDigest([1; 32]), path: model.path.clone(), place: model.place.clone(), ..model };
    before.whole().write(&loaded, &|| false).unwrap();
    let name = |copy: &PackedCopy| copy.path().file_name().unwrap().to_string_lossy().into_owned();
    let stem = name(&model.whole()).rsplitn(3, '.').last().unwrap().to_owned();
    // A stranger's file that happens to have such a name, an unfinished one of a dead process, and one of another model.
    let foreign = format!("{stem}.0000000000000000.packed");
    let abandoned = format!(".{}.4000000-0.partial", name(&before.whole()));
    let unrelated = ".other.layers-0-2.tp-0-of-1.0000000000000000.packed.1-0.partial".to_owned();
    for name in [&foreign, &abandoned, &unrelated] {
        fs::write(cache.path().join(name), vec![0; 500]).unwrap();
    }
    model.whole().write(&loaded, &|| false).unwrap();
    let mut expected = vec![unrelated, foreign, name(&model.whole())];
    expected.sort();
    assert_eq!(names(cache.path()), expected);
}

#[test]
fn one_process_at_a_time_writes_a_copy() {
    let directory = tempfile::tempdir().unwrap();
    let (model, loaded, bytes) = small(directory.path());
    let copy = model.whole();
    let folder = copy.path().parent().unwrap();
    let name = copy.path().file_name().unwrap().to_string_lossy().into_owned();
    let other = folder.join(format!(".{name}.4000000-0.partial"));
    let alive = File::create(&other).unwrap();
    alive.lock().unwrap();
    assert!(matches!(copy.write(&loaded, &|| false), Err(CopyWriteError::Busy(_))));
    drop(alive);
    copy.write(&loaded, &|| false).unwrap();
    assert!(!other.exists() && fs::read(copy.path()).unwrap() == bytes);
    // Two that begin at the same moment both succeed.
    fs::remove_file(copy.path()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let outcome = copy.write(&loaded, &|| false);
                assert!(matches!(outcome, Ok(_) | Err(CopyWriteError::Busy(_))), "{outcome:?}");
            });
        }
    });
    assert!(fs::read(copy.path()).unwrap() == bytes);
    assert_eq!(names(folder), [name]);
}
