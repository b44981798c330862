//! `ashlar quantize`: a model as one GGUF file.

use crate::roles;
use anyhow::{Context, Result, bail};
use ashlar_kernels::{ThreadPool, available_threads};
use ashlar_model::{Export, ExportError, hub};
use ashlar_service_kit::Shutdown;
use ashlar_tokenizer::GgufVocabulary;
use ashlar_vocabulary::{Bytes, Quantization, WeightType};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Arguments of `ashlar quantize`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar quantize --model ./llama-3.2-1b --type q4_k_m --out ./llama-3.2-1b-q4_k_m.gguf
  ashlar quantize --model Qwen/Qwen3-0.6B --type q8_0 --out ./qwen3-0.6b-q8_0.gguf
  ashlar quantize --model ./model-f16.gguf --type q6_k --out ./model-q6_k.gguf --force
Types: f32, bf16, f16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0. The file holds the
configuration, the weights, the tokenizer and the chat template; llama.cpp reads it, too. Where rows are whole blocks
of the type, it gives the bits that `ashlar up --quantize` gives, without the work at every start.")]
pub(crate) struct QuantizeArgs {
    /// Model directory, hub id (`org/name`, `org/name@revision`), or GGUF file.
    #[arg(long, value_name = "DIR|HUB_ID|FILE")]
    model: String,
    /// Type of the weights.
    #[arg(long = "type", value_name = "TYPE")]
    quantization: Quantization,
    /// The file to write; its name ends in .gguf.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
    /// Threads; default: all that this machine has.
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Report {
    file: PathBuf,
    quantization: Quantization,
    bytes: u64,
    weights: u64,
    bits_per_weight: f64,
    /// How many tensors have which type.
    tensors: BTreeMap<WeightType, usize>,
    notes: Vec<String>,
    seconds: f64,
}

pub(crate) fn run(args: QuantizeArgs) -> Result<()> {
    check_target(&args.out, args.force)?;
    let runtime = roles::runtime()?;
    // Ctrl-C is asked about between chunks of rows, so that the unfinished file is removed.
    let shutdown = runtime.block_on(async { Shutdown::listen() }).context("cannot listen to signals")?;
    let model = hub::resolve(&args.model, &mut |file| eprintln!("fetching {file} of {}", args.model))?;
    let started = Instant::now();
    let export = Export::open(&model, args.quantization)?;
    let mut notes = export.notes().to_vec();
    let mut labels = Vec::new();
    if !export.has_metadata() {
        let found = GgufVocabulary::from_checkpoint(&model)
            .with_context(|| format!("the tokenizer of {}", args.model))?;
        notes.extend(found.notes);
        let mut vocabulary = found.vocabulary;
        let rows = export.config().shape.vocab_size;
        if vocabulary.tokens.len() > rows {
            notes.push(format!(
                "the tokenizer has {} tokens, the model only {rows}: llama.cpp will refuse the file",
                vocabulary.tokens.len()
            ));
        }
        vocabulary.pad_to(rows);
        labels.extend(vocabulary.to_metadata());
        labels.push(("general.name", name_of(&args.model, &model).as_str().into()));
    }
    for note in &notes {
        eprintln!("note: {note}");
    }
    let bar = progress_bar(&args.out)?;
    let pool = ThreadPool::new(args.threads.unwrap_or_else(available_threads));
    let bytes = export.write(&args.out, &labels, &pool, &mut |written, total| {
        bar.set_length(total.0);
        bar.set_position(written.0);
        if shutdown.reason().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error @ ExportError::Stopped) => bail!(error),
        Err(error) => return Err(error).with_context(|| format!("{} was not written", args.out.display())),
    };
    print_report(&report(&args, &export, bytes, notes, started.elapsed()), args.json)
}

/// The commonest mistakes should cost no time.
fn check_target(out: &Path, force: bool) -> Result<()> {
    if out.extension().is_none_or(|extension| extension != "gguf") {
        bail!("--out {}: end the name in .gguf, by which models in such files are known", out.display());
    }
    if out.is_dir() {
        bail!("--out {} is a directory: name a file in it", out.display());
    }
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        bail!("--out {}: there is no directory {}: make it first", out.display(), folder.display());
    }
    if !force && out.symlink_metadata().is_ok() {
        bail!("{} is there already: choose another name, or replace it with --force", out.display());
    }
    Ok(())
}

/// A hub id says more than the folder of the cache that it becomes.
fn name_of(asked: &str, directory: &Path) -> String {
    let is_path = Path::new(asked).exists();
    let folder = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let name = match asked.split_once('@').map_or(asked, |(id, _)| id).rsplit_once('/') {
        Some((_, name)) if !is_path => name.to_owned(),
        _ => folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    if name.is_empty() { "model".into() } else { name }
}

fn progress_bar(out: &Path) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .context("progress bar")?;
    let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(ProgressBar::new(0).with_style(style).with_message(name))
}

fn report(
    args: &QuantizeArgs,
    export: &Export,
    bytes: Bytes,
    notes: Vec<String>,
    elapsed: Duration,
) -> Report {
    let weights = export.weights();
    Report {
        file: args.out.clone(),
        quantization: args.quantization,
        bytes: bytes.0,
        weights,
        bits_per_weight: 8.0 * export.tensor_bytes().0 as f64 / weights.max(1) as f64,
        tensors: export.types(),
        notes,
        seconds: elapsed.as_secs_f64(),
    }
}

fn print_report(report: &Report, json: bool) -> Result<()> {
    let text = if json {
        serde_json::to_string_pretty(report).context("json")?
    } else {
        let tensors: Vec<String> =
            report.tensors.iter().map(|(kind, count)| format!("{count} in {kind}")).collect();
        format!(
            "{file}: {}, {:.2} bits per weight, {:.1} million weights, {:.1} s\ntensors:   {}\n\
             serve it:  ashlar up --model {file}",
            Bytes(report.bytes),
            report.bits_per_weight,
            report.weights as f64 / 1e6,
            report.seconds,
            tensors.join(", "),
            file = report.file.display(),
        )
    };
    // The file is written; that nobody reads about it is no failure.
    let _ = writeln!(io::stdout(), "{text}");
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_is_not_replaced_unless_asked_for() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(check_target(&here.join("new.gguf"), false).is_ok());
        let error = check_target(here, true).unwrap_err().to_string();
        assert!(error.contains(".gguf"), "{error}");
        let present = std::env::temp_dir().join(format!("ashlar-quantize-{}.gguf", std::process::id()));
        let error = check_target(&present.join("x.gguf"), false).unwrap_err().to_string();
        assert!(error.contains("there is no directory"), "{error}");
        std::fs::write(&present, b"precious").unwrap();
        let error = check_target(&present, false).unwrap_err().to_string();
        assert!(error.contains("--force"), "{error}");
        assert!(check_target(&present, true).is_ok());
        std::fs::remove_file(&present).unwrap();
    }

    #[test]
    fn a_model_is_called_by_its_id_or_its_folder() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(name_of("Qwen/Qwen3-0.6B@main", Path::new("/cache/snapshots/abc")), "Qwen3-0.6B");
        assert_eq!(name_of(&folder.to_string_lossy(), folder), "ashlar");
    }
}
