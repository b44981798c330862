//! `ashlar bench quality`: what quantisation costs, on a text.
//!
//! Layout: [`text`] (chunks of tokens), [`evaluator`] (a model, a chunk at a time), [`score`] (perplexity, KL, agreement),
//! [`report`].
//!
//! The method is that of `llama-perplexity`: the text is cut into chunks, each computed from an empty cache, and the second
//! half of each is scored, so that every scored token has at least half a chunk before it. Reference and candidate go
//! through the text side by side, so nothing is stored but a few sums and one number per position.

mod evaluator;
mod report;
mod score;
#[cfg(test)]
mod tests;
mod text;

use super::{MEASURING, progress_bar, require_memory};
use anyhow::{Context, Result, bail};
use ashlar_kernels::{Isa, Kernels, available_threads};
use ashlar_model::hub;
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_tokenizer::{Tokenizer, TokenizerError};
use ashlar_vocabulary::{Bytes, FloatType, Precision, Quantization, TokenId};
use clap::Args;
use evaluator::{Evaluator, STEP_ROWS_MAX, Source};
use report::{Candidate, Reference, Report, TextReport};
use score::{Reading, Totals, perplexity, score};
use std::path::PathBuf;
use std::sync::Arc;
use text::Text;

/// Arguments of `ashlar bench quality`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar bench quality --model ./llama-3.2-1b --text wiki.test.raw --quantize q8_0,q4_k_m,q4_0
  ashlar bench quality --model ./llama-3.2-1b --text wiki.test.raw --against llama-3.2-1b-q4_k_m.gguf
  ashlar bench quality --model m.gguf --text wiki.test.raw --tokens 20480 --json      perplexity alone
The reference is the model as its files have it. Tokens are cut into chunks, each computed from an empty cache, and the
predictions of its second half are scored, as llama-perplexity does with the same context. `bits` are bits per weight in
memory; `Δ` is the perplexity above the reference's; KL is KL(reference ‖ candidate) in nats; `same top` is how often both
hold the same token for the likeliest; `RMS Δp` is the change of the true token's probability. ± is one standard error.
Two models are in memory at a time.")]
pub(crate) struct QualityArgs {
    /// The reference: model directory, GGUF file or hub id.
    #[arg(long, value_name = "DIR|FILE.gguf|HUB_ID")]
    model: String,
    /// The text, UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Compare with the same model, quantised while it is loaded: q8_0, q4_0, q4_k_m …
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    quantize: Vec<Quantization>,
    /// Compare with the same model over a cache of another type: bf16, f16.
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    kv_cache_type: Vec<FloatType>,
    /// Compare with the same model with activations of another type between its layers: bf16, f16.
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    activation_type: Vec<FloatType>,
    /// Compare with another model of the same vocabulary; may be repeated.
    #[arg(long, value_name = "FILE.gguf|DIR|HUB_ID")]
    against: Vec<String>,
    /// Tokens of a chunk.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Only the first so many tokens of the text, in whole chunks.
    #[arg(long)]
    tokens: Option<usize>,
    /// Compute threads; default: all that this process may use.
    #[arg(long)]
    threads: Option<usize>,
    /// Instruction set: avx512, avx512bw, avx2 or portable; default: the best.
    #[arg(long, value_parser = super::parse_isa)]
    isa: Option<Isa>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &QualityArgs) -> Result<()> {
    let report = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("json")?);
    } else {
        report.print();
    }
    Ok(())
}

fn measure(args: &QualityArgs) -> Result<Report> {
    if Text::scored(args.chunk).is_empty() {
        bail!("--chunk must be at least 3: its first half is context, and its last token is only predicted");
    }
    let (reference, candidates) = sources(args)?;
    let tokenizer = Tokenizer::open(&reference.path)?;
    let text = Text::read(&args.text, &tokenizer, args.chunk, args.tokens)?;
    check_vocabularies(&reference, &candidates, &tokenizer, &text)?;
    let most = candidates.iter().map(|candidate| candidate.memory(args.chunk)).max().unwrap_or(Bytes(0));
    require_memory(
        reference.memory(args.chunk) + most,
        "reference and candidate are held at once; choose a smaller model or free some memory",
    )?;

    let threads = args.threads.unwrap_or_else(available_threads).max(1);
    let kernels = Arc::new(Kernels::new(args.isa.unwrap_or_else(Isa::best), threads));
    let mut model = reference.load(args.chunk, &kernels)?;
    let mut results = Vec::new();
    for candidate in &candidates {
        let mut other = candidate.load(args.chunk, &kernels)?;
        results.push(compare(&text, args.chunk, threads, &mut model, Some(&mut other), &candidate.name)?);
    }
    if results.is_empty() {
        results.push(compare(&text, args.chunk, threads, &mut model, None, &reference.name)?);
    }
    Ok(Report {
        text: TextReport::new(args.text.display().to_string(), &text, args.chunk, results[0].count()),
        threads,
        isa: kernels.isa().to_string(),
        reference: Reference::new(&reference, &results[0]),
        candidates: candidates
            .iter()
            .zip(&results)
            .map(|(source, totals)| Candidate::new(source, totals))
            .collect(),
    })
}

/// The reference and what is compared with it.
fn sources(args: &QualityArgs) -> Result<(Source, Vec<Source>)> {
    let resolve = |model: &str| hub::resolve(model, &mut |file| eprintln!("fetching {file}"));
    let path = resolve(&args.model)?;
    let reference = Source::open(args.model.clone(), path.clone(), Precision::default())?;
    let mut candidates = Vec::new();
    for &quantization in &args.quantize {
        candidates.push(Source::open(quantization.to_string(), path.clone(), Some(quantization).into())?);
    }
    for &kv_cache in &args.kv_cache_type {
        let precision = Precision { kv_cache, ..Precision::default() };
        candidates.push(Source::open(format!("KV cache {kv_cache}"), path.clone(), precision)?);
    }
    for &activations in &args.activation_type {
        let precision = Precision { activations, ..Precision::default() };
        candidates.push(Source::open(format!("activations {activations}"), path.clone(), precision)?);
    }
    for model in &args.against {
        candidates.push(Source::open(model.clone(), resolve(model)?, Precision::default())?);
    }
    for source in candidates.iter().chain([&reference]) {
        source.require_context(args.chunk)?;
    }
    Ok((reference, candidates))
}

/// Predictions can be compared only where the same ids mean the same text.
fn check_vocabularies(
    reference: &Source,
    candidates: &[Source],
    tokenizer: &Tokenizer,
    text: &Text,
) -> Result<()> {
    let size = reference.config.shape.vocab_size;
    if let Some(token) = text.tokens().iter().find(|&&token| token as usize >= size) {
        bail!(
            "the tokenizer of {} gives token {token}, and its model has {size}: the files do not belong together",
            reference.name
        );
    }
    for candidate in candidates.iter().filter(|candidate| candidate.path != reference.path) {
        let other = candidate.config.shape.vocab_size;
        if other != size {
            bail!("the vocabularies differ: {size} tokens, and {other} for {}", candidate.name);
        }
        match Tokenizer::open(&candidate.path) {
            Ok(other) => text.require_same_pieces(tokenizer, &other, &candidate.name)?,
            // A directory with nothing but weights: the reference's tokenizer serves both.
            Err(TokenizerError::Missing { .. }) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot use {}", candidate.name)),
        }
    }
    Ok(())
}

/// Takes both models through the text, chunk by chunk.
fn compare(
    text: &Text,
    chunk: usize,
    threads: usize,
    reference: &mut Evaluator,
    mut candidate: Option<&mut Evaluator>,
    name: &str,
) -> Result<Totals> {
    let mut totals = Totals::default();
    let bar = progress_bar(text.chunks_count() as u64, MEASURING);
    for tokens in text.chunks() {
        // The last token is only predicted, never computed.
        for start in (0..chunk - 1).step_by(STEP_ROWS_MAX) {
            let end = (start + STEP_ROWS_MAX).min(chunk - 1);
            reference.forward(&tokens[start..end], start)?;
            if let Some(candidate) = &mut candidate {
                candidate.forward(&tokens[start..end], start)?;
            }
            let scored: Vec<usize> = (Text::scored(chunk).start.max(start)..end).collect();
            for positions in scored.chunks(LOGIT_ROWS_MAX) {
                let rows: Vec<usize> = positions.iter().map(|position| position - start).collect();
                let ours = reference.logits(&rows)?;
                let other = candidate.as_mut().map(|candidate| candidate.logits(&rows)).transpose()?;
                let truths: Vec<TokenId> = positions.iter().map(|position| tokens[position + 1]).collect();
                let readings = readings(ours, other, &truths, threads);
                let readings =
                    readings.with_context(|| format!("{name}: some logits are not finite numbers"))?;
                readings.iter().for_each(|reading| totals.push(reading));
            }
        }
        bar.inc(1);
        let so_far = if candidate.is_some() { &totals.candidate } else { &totals.reference };
        bar.set_message(format!("{name}: perplexity {:.3}", perplexity(so_far).0));
    }
    bar.finish_and_clear();
    Ok(totals)
}

/// The readings of rows of logits, in their order whatever the number of threads. `None` where logits are not finite.
fn readings(
    reference: &[f32],
    candidate: Option<&[f32]>,
    truths: &[TokenId],
    threads: usize,
) -> Option<Vec<Reading>> {
    let vocabulary = reference.len() / truths.len().max(1);
    let row = |logits: &'_ [f32], row: usize| row * vocabulary..((row + 1) * vocabulary).min(logits.len());
    let one = |(index, &truth): (usize, &TokenId)| {
        let other = candidate.map(|logits| &logits[row(logits, index)]);
        score(&reference[row(reference, index)], other, truth as usize)
    };
    // Small vocabularies are done before another thread has started.
    const PARALLEL_LOGITS_MIN: usize = 1 << 18;
    if threads < 2 || reference.len() < PARALLEL_LOGITS_MIN {
        return truths.iter().enumerate().map(one).collect();
    }
    let share = truths.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let running: Vec<_> = truths
            .chunks(share)
            .enumerate()
            .map(|(part, truths)| {
                scope.spawn(move || {
                    let rows = truths.iter().enumerate().map(|(index, truth)| (part * share + index, truth));
                    rows.map(one).collect::<Option<Vec<Reading>>>()
                })
            })
            .collect();
        let parts: Option<Vec<_>> = running.into_iter().map(|part| part.join().ok().flatten()).collect();
        Some(parts?.concat())
    })
}
