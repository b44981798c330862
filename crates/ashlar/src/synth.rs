//! `ashlar synth`: a random-weight model of a real shape.

use anyhow::{Context, Result};
use ashlar_model::synth::{SHAPES, SynthRequest, synthesize};
use ashlar_vocabulary::FloatType;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Arguments of `ashlar synth`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar synth llama-3.2-1b --out ./synth-1b
  ashlar synth ./config.json --dtype f32 --out ./mine
Shapes: llama-3.2-1b, llama-3.1-8b, qwen2.5-0.5b, qwen3-0.6b, mistral-7b, or the path of a config.json.")]
pub(crate) struct SynthArgs {
    /// A named shape, or the path of a config.json.
    shape: String,
    /// Directory to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Element type of the weights: f32, bf16 or f16.
    #[arg(long, value_name = "TYPE", default_value_t = FloatType::Bf16)]
    dtype: FloatType,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A tokenizer.json to copy (with the tokenizer_config.json beside it); default: byte-level, padded to the
    /// vocabulary.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

pub(crate) fn run(args: SynthArgs) -> Result<()> {
    let request =
        SynthRequest { shape: args.shape, dtype: args.dtype, seed: args.seed, tokenizer: args.tokenizer };
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .context("progress bar")?,
    );
    let config = synthesize(&args.out, &request, &mut |written, total| {
        bar.set_length(total.0);
        bar.set_position(written.0);
    })
    .with_context(|| format!("shapes known by name: {}", SHAPES.join(", ")))?;
    bar.finish_and_clear();
    let shape = &config.shape;
    println!(
        "{}: {} layers, hidden {}, vocabulary {}, random weights (seed {})",
        args.out.display(),
        shape.num_layers,
        shape.hidden_size,
        shape.vocab_size,
        request.seed
    );
    println!("serve it:  ashlar up --model {}", args.out.display());
    Ok(())
}
