//! How fast candle-transformers runs a model as it comes, for `ashlar bench model --against`.
//!
//! `cargo run --release -p ashlar-candle-oracle --example speed -- MODEL.gguf|DIR [prefill] [decode steps]`: a Llama as one GGUF
//! file, or a directory of safetensors with its own element type. Prints `prefill 512 123.4` and `decode 1 12.3` (rows,
//! tokens/s). RAYON_NUM_THREADS sets the threads.
#![allow(clippy::unwrap_used, missing_docs)]

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, quantized_llama};
use std::fs::File;
use std::path::Path;
use std::time::Instant;

/// Tokens in the cache when decoding is measured.
const CONTEXT: usize = 128;

enum Model {
    Quantized(quantized_llama::ModelWeights),
    Plain(llama::Llama, llama::Config, DType),
}

impl Model {
    fn open(path: &Path) -> Result<Model> {
        let device = Device::Cpu;
        if path.is_file() {
            let mut file = File::open(path)?;
            let content = gguf_file::Content::read(&mut file)?;
            return Ok(Model::Quantized(quantized_llama::ModelWeights::from_gguf(
                content, &mut file, &device,
            )?));
        }
        let text = std::fs::read_to_string(path.join("config.json"))?;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let dtype = match json["torch_dtype"].as_str() {
            Some("bfloat16") => DType::BF16,
            Some("float16") => DType::F16,
            _ => DType::F32,
        };
        let config: llama::LlamaConfig = serde_json::from_value(json).unwrap();
        let config = config.into_config(false);
        let mut files: Vec<_> = std::fs::read_dir(path)?.map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|end| end == "safetensors"));
        files.sort();
        let tensors = files.iter().map(|file| candle_core::safetensors::load(file, &device));
        let mut all = std::collections::HashMap::new();
        for some in tensors {
            all.extend(some?);
        }
        let weights = VarBuilder::from_tensors(all, dtype, &device);
        Ok(Model::Plain(llama::Llama::load(weights, &config)?, config, dtype))
    }

    /// Seconds for a prompt of `prompt` tokens, and for each of `steps` tokens after it.
    fn time(&mut self, prompt: usize, steps: usize) -> Result<(f64, f64)> {
        let tokens: Vec<u32> = (0..prompt as u32).map(|i| i * 7919 % 1000).collect();
        let input = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0);
        let mut cache = match self {
            Model::Plain(_, config, dtype) => Some(llama::Cache::new(true, *dtype, config, &Device::Cpu)?),
            Model::Quantized(_) => None,
        };
        let mut forward = |tokens: &[u32], position: usize| -> Result<()> {
            let logits = match self {
                Model::Quantized(model) => model.forward(&input(tokens)?, position)?,
                Model::Plain(model, ..) => {
                    model.forward(&input(tokens)?, position, cache.as_mut().unwrap())?
                }
            };
            logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>().map(drop)
        };
        let began = Instant::now();
        forward(&tokens, 0)?;
        let prefill = began.elapsed().as_secs_f64();
        let began = Instant::now();
        for step in 0..steps {
            forward(&[17], prompt + step)?;
        }
        Ok((prefill, began.elapsed().as_secs_f64()))
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| arguments.get(at).map_or(default, |text| text.parse().unwrap());
    let path = arguments.first().expect("a model: FILE.gguf or DIR");
    let (prompt, steps) = (number(1, 512), number(2, 16));
    let mut model = Model::open(Path::new(path))?;
    model.time(CONTEXT, 1)?;
    let (prefill, _) = model.time(prompt, 0)?;
    println!("prefill {prompt} {:.2}", prompt as f64 / prefill);
    let (_, decode) = model.time(CONTEXT, steps)?;
    println!("decode 1 {:.3}", steps as f64 / decode);
    Ok(())
}
