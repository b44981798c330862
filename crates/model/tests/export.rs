//! Models as GGUF files: the same bits as the checkpoint, or as quantising while loading; whole or not at all.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::{Isa, ThreadPool};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{Export, ExportError, ModelConfig, WeightFiles};
use ashlar_vocabulary::{Bytes, FloatType, Quantization};
use common::{Grid, bits, goldens};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

fn export(model: &Path, name: &str, out: &Path) -> Result<Bytes, ExportError> {
    let export = Export::open(model, name.parse().unwrap())?;
    let mut heard = (Bytes(0), Bytes(0));
    let written = export.write(out, &[], &ThreadPool::new(2), &mut |written, total| {
        assert!(written.0 > heard.0.0 && written.0 <= total.0);
        heard = (written, total);
        ControlFlow::Continue(())
    })?;
    assert_eq!(heard, (export.tensor_bytes(), export.tensor_bytes()));
    assert_eq!(fs::metadata(out).unwrap().len(), written.0);
    Ok(written)
}

fn logits(grid: &mut Grid) -> Vec<Vec<u32>> {
    let vocabulary = grid.config.shape.vocab_size as u32;
    let prompt: Vec<u32> = (0..37).map(|i| (i * 53 + 7) % vocabulary).collect();
    grid.greedy(&prompt, 4).1.iter().map(|row| bits(row)).collect()
}

fn loaded(model: &Path, quantization: Option<&str>) -> Vec<Vec<u32>> {
    let quantization = quantization.map(|name| name.parse().unwrap());
    logits(&mut Grid::quantized(model, quantization, 1, 1, Isa::best(), 1))
}

/// A model whose inputs are whole superblocks.
fn synthesized(directory: &Path, family: &str, tied: bool) {
    let config = format!(
        r#"{{"architectures":["{family}ForCausalLM"],"model_type":"{}","hidden_size":256,"intermediate_size":768,
        "num_hidden_layers":3,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,"vocab_size":384,
        "max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":{tied}}}"#,
        family.to_lowercase()
    );
    let shape = directory.join("shape.json");
    fs::write(&shape, config).unwrap();
    let request = SynthRequest {
        shape: shape.to_string_lossy().into_owned(),
        dtype: FloatType::F32,
        seed: 5,
        tokenizer: None,
    };
    synthesize(directory, &request, &mut |_, _| {}).unwrap();
}

#[test]
fn an_f32_file_gives_the_bits_of_the_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    // Not of a bf16 checkpoint: products with bf16 weights round their activations, those with f32 weights do not.
    let names =
        ["llama", "llama-bias", "llama-f16", "llama-sharded", "llama3-rope", "mistral", "qwen2", "qwen3"];
    for name in names {
        let model = goldens().join(name);
        let file = directory.path().join(format!("{name}.gguf"));
        export(&model, "f32", &file).unwrap();
        assert!(loaded(&file, None) == loaded(&model, None), "{name}");
        // Once more, from file to file.
        let again = directory.path().join(format!("{name}-again.gguf"));
        export(&file, "f32", &again).unwrap();
        assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap(), "{name}");
        let config = ModelConfig::open(&file, None).unwrap();
        let expected = ModelConfig::open(&model, None).unwrap();
        assert_eq!(config.rope_scaling, expected.rope_scaling);
        assert_eq!(config.sliding_window, expected.sliding_window);
    }
}

#[test]
fn halves_stay_what_they_are() {
    let directory = tempfile::tempdir().unwrap();
    for (name, kind) in [("llama-bf16", "bf16"), ("llama-f16", "f16")] {
        let model = goldens().join(name);
        let file = directory.path().join(format!("{name}.gguf"));
        export(&model, kind, &file).unwrap();
        assert!(loaded(&file, None) == loaded(&model, None), "{name}");
    }
}

#[test]
fn a_quantised_file_gives_the_bits_of_quantising_while_loading() {
    let names = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k"];
    for (family, tied) in [("Llama", false), ("Qwen2", true), ("Qwen3", false)] {
        let directory = tempfile::tempdir().unwrap();
        synthesized(directory.path(), family, tied);
        let whole = directory.path().join("whole.gguf");
        export(directory.path(), "f32", &whole).unwrap();
        for name in names {
            let expected = loaded(directory.path(), Some(name));
            let file = directory.path().join(format!("{name}.gguf"));
            export(directory.path(), name, &file).unwrap();
            assert!(loaded(&file, None) == expected, "{family} {name}");
            let through = directory.path().join(format!("{name}-through.gguf"));
            export(&whole, name, &through).unwrap();
            assert!(fs::read(&file).unwrap() == fs::read(&through).unwrap(), "{family} {name} from GGUF");
        }
    }
}

#[test]
fn a_window_that_starts_at_a_later_layer_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    synthesized(directory.path(), "Qwen2", true);
    let path = directory.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["use_sliding_window"] = true.into();
    config["sliding_window"] = 8.into();
    config["max_window_layers"] = 2.into();
    fs::write(&path, config.to_string()).unwrap();
    let file = directory.path().join("windowed.gguf");
    export(directory.path(), "f32", &file).unwrap();
    assert_eq!(ModelConfig::open(&file, None).unwrap().first_window_layer, 2);
    assert!(loaded(&file, None) == loaded(directory.path(), None));
    let notes = Export::open(directory.path(), "q8_0".parse().unwrap()).unwrap().notes().join("\n");
    assert!(notes.contains("past 8 tokens"), "{notes}");
}

/// The golden llama, the last weight of a late matrix replaced.
fn with_weight(value: f32) -> tempfile::TempDir {
    let model = tempfile::tempdir().unwrap();
    fs::copy(goldens().join("llama/config.json"), model.path().join("config.json")).unwrap();
    let mut bytes = fs::read(goldens().join("llama/model.safetensors")).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let offsets = &header["model.layers.1.mlp.up_proj.weight"]["data_offsets"];
    let end = data + offsets[1].as_u64().unwrap() as usize;
    bytes[end - 4..end].copy_from_slice(&value.to_le_bytes());
    fs::write(model.path().join("model.safetensors"), &bytes).unwrap();
    model
}

#[test]
fn an_error_or_a_stop_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("model.gguf");
    fs::write(&out, b"what was here before").unwrap();
    let untouched = || {
        let names = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["model.gguf"]);
        assert_eq!(fs::read(&out).unwrap(), b"what was here before");
    };
    let model = with_weight(f32::NAN);
    let error = export(model.path(), "q8_0", &out).unwrap_err();
    assert!(matches!(error, ExportError::Block { .. }), "{error}");
    assert!(error.to_string().contains("blk.1.ffn_up.weight"), "{error}");
    untouched();
    let stopped = Export::open(&goldens().join("llama"), "q8_0".parse().unwrap()).unwrap();
    let mut calls = 0;
    let error = stopped.write(&out, &[], &ThreadPool::new(2), &mut |_, _| {
        calls += 1;
        if calls > 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(error, Err(ExportError::Stopped)));
    untouched();
    // A checkpoint that is not whole is found before anything is written.
    let weights = model.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 8]).unwrap();
    assert!(Export::open(model.path(), Quantization::Q4KM).is_err());
}

#[test]
fn weights_that_a_type_cannot_hold_are_refused() {
    let model = with_weight(1e6);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("model.gguf");
    let error = export(model.path(), "f16", &out).unwrap_err();
    assert!(matches!(error, ExportError::ExceedsF16 { .. }), "{error}");
    export(model.path(), "bf16", &out).unwrap();
}

#[test]
fn a_truncated_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.gguf");
    export(&goldens().join("qwen3"), "q8_0", &file).unwrap();
    let bytes = fs::read(&file).unwrap();
    // The last bytes may be padding, which nobody misses.
    for length in [bytes.len() - 32, bytes.len() / 2, 100, 3] {
        fs::write(&file, &bytes[..length]).unwrap();
        assert!(WeightFiles::open(&file).is_err(), "{length} of {} bytes", bytes.len());
        assert!(Export::open(&file, Quantization::Q4KM).is_err());
    }
}
