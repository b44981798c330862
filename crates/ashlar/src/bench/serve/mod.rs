//! `ashlar bench serve`: a running service under load, seen from outside.
//!
//! Layout: [`workload`] (what is asked and when, from a seed), [`trace`] (recorded arrivals), [`load`] (open and closed
//! loops), [`arrivals`] (a load without its content), [`client`] (one request and when its parts arrived), [`stages`] (the service's own counters), [`report`].
//!
//! A time is taken when a chunk's bytes arrive, before they are parsed; requests are generated before they are due, and
//! the client's own delay is reported beside the latencies.

pub(crate) mod arrivals;
mod client;
mod load;
mod report;
mod stages;
#[cfg(test)]
mod tests;
mod trace;
mod workload;

use super::{MEASURING, progress_bar};
use crate::http::{Client, DEFAULT_URL};
use anyhow::{Context, Result, bail};
use clap::Args;
use client::Template;
use load::Until;
use report::{Objectives, Report, Subject};
use serde_json::Value;
use stages::Snapshot;
use std::path::PathBuf;
use std::time::{Duration, Instant};
pub(crate) use workload::Length;
use workload::{Caps, Pace, Source, Workload};

/// Arguments of `ashlar bench serve`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  ashlar bench serve                                               four clients, one request after the other
  ashlar bench serve --rate 2 --duration 60 --input-tokens 64..512 Poisson arrivals for a minute
  ashlar bench serve --concurrency 16 --shared-prefix 1024 --prefix-groups 4
  ashlar bench serve --trace AzureLLMInferenceTrace_conv.csv --trace-speed 10 --limit 200 --max-input-tokens 1024
  ashlar bench serve --url http://other:8000 --text --json         any OpenAI-compatible service
Prompts are token ids (Ashlar, vLLM, llama.cpp, …) unless --text is given. A seed fixes every request and every arrival.
Ctrl-C ends early and reports what there is. Goodput: requests/s that meet both objectives.")]
pub(crate) struct ServeArgs {
    /// Address of the service.
    #[arg(long, default_value = DEFAULT_URL)]
    url: String,
    /// Model to ask; default: the first that is served.
    #[arg(long)]
    model: Option<String>,
    /// API key, if the service wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// How many requests; default: 64, all of a trace, or as many as --duration takes.
    #[arg(long)]
    requests: Option<usize>,
    /// Send for so many seconds; what is in flight then is waited for.
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    duration: Option<f64>,
    /// Open loop: requests per second on average, with Poisson arrivals.
    #[arg(long, conflicts_with = "concurrency", value_parser = positive)]
    rate: Option<f64>,
    /// Closed loop: requests in flight at any time [default: 4].
    #[arg(long)]
    concurrency: Option<usize>,
    /// Tokens of a prompt: a number, or a range as 64..512.
    #[arg(long, default_value = "128")]
    input_tokens: Length,
    /// Tokens of an answer: a number, or a range.
    #[arg(long, default_value = "64")]
    output_tokens: Length,
    /// Tokens before each prompt that it shares with others.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    shared_prefix: usize,
    /// How many different shared prefixes there are.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    prefix_groups: usize,
    /// Recorded lengths and times: JSON lines of `at_s`, `prompt_tokens` and `output_tokens`, Azure's CSV or Mooncake's JSON lines.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Replay the trace so many times faster.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive)]
    trace_speed: f64,
    /// Only the first requests of the trace.
    #[arg(long)]
    limit: Option<usize>,
    /// Shorten longer prompts, at their end.
    #[arg(long, value_name = "TOKENS")]
    max_input_tokens: Option<usize>,
    /// Shorten longer answers.
    #[arg(long, value_name = "TOKENS")]
    max_output_tokens: Option<usize>,
    /// Objective: time to the first token.
    #[arg(long, value_name = "MS", default_value_t = 2000.0)]
    slo_ttft_ms: f64,
    /// Objective: time per output token after the first.
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    slo_tpot_ms: f64,
    /// Draw token ids below this number.
    #[arg(long, default_value_t = 256)]
    vocabulary: usize,
    /// Send words and only OpenAI's own fields (then an answer may end early).
    #[arg(long)]
    text: bool,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Requests before the clock starts.
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// A request that takes longer has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout_s: u64,
    /// Fixes every request and every arrival.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How many requests are sent where nothing else ends a run.
const REQUESTS: usize = 64;

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err(format!("`{text}` is no positive number")),
    }
}

pub(crate) fn run(args: ServeArgs) -> Result<()> {
    let json = args.json;
    let report = client_runtime()?.block_on(measure(args))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report).context("json")?);
    } else {
        report.print();
    }
    if report.is_empty() {
        bail!("no request was answered");
    }
    Ok(())
}

/// A runtime of one thread: on a machine that also serves, a client shall take as little as it can of what it measures.
fn client_runtime() -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the asynchronous runtime")
}

async fn measure(args: ServeArgs) -> Result<Report> {
    let client = Client::new(&args.url, args.key.clone())?;
    let served = Served::ask(&client, args.model.as_deref()).await?;
    let workload = workload(&args, served.max_context)?;
    workload.check()?;
    let template = Template {
        model: served.model.clone(),
        temperature: args.temperature,
        plain: args.text,
        receipt: served.ashlar && !args.text,
        timeout: Duration::from_secs(args.timeout_s),
    };
    warm_up(&args, &client, &template, &workload).await?;
    let before = Snapshot::take(&client).await;
    let until = until(&args, &workload);
    let bar = progress_bar(until.requests as u64, MEASURING);
    if until.requests == usize::MAX {
        bar.unset_length();
    }
    let run = load::run(&client, &template, &workload, until, &bar).await?;
    bar.finish_and_clear();
    let after = match &before {
        Some(_) => Snapshot::take(&client).await,
        None => None,
    };
    let stages = before.zip(after).map(|(before, after)| stages::shares(&before, &after));
    let subject = Subject {
        url: args.url.clone(),
        model: served.model,
        load: describe(&args, workload.pace),
        seed: args.seed,
        objectives: Objectives { ttft_ms: args.slo_ttft_ms, tpot_ms: args.slo_tpot_ms },
    };
    Ok(Report::new(subject, &run, stages))
}

/// What the service says of itself.
#[derive(Debug)]
struct Served {
    model: String,
    max_context: Option<usize>,
    ashlar: bool,
}

impl Served {
    async fn ask(client: &Client, wanted: Option<&str>) -> Result<Served> {
        let (status, body) = client.get("/v1/models").await?;
        let cards: &[Value] = body["data"].as_array().map_or(&[], Vec::as_slice);
        let card = match wanted {
            Some(wanted) => cards.iter().find(|card| card["id"] == wanted),
            None => cards.first(),
        };
        let model = wanted.or_else(|| card.and_then(|card| card["id"].as_str()));
        let Some(model) = model else { bail!("the service lists no model (status {status}): give --model") };
        let field = |name: &str| card.map_or(&Value::Null, |card| &card[name]);
        Ok(Served {
            model: model.to_owned(),
            max_context: field("max_model_len").as_u64().map(|tokens| tokens as usize),
            ashlar: field("owned_by") == "ashlar",
        })
    }
}

fn workload(args: &ServeArgs, max_context: Option<usize>) -> Result<Workload> {
    let source = match &args.trace {
        Some(path) => Source::Trace(trace::read(path, args.limit.unwrap_or(usize::MAX))?),
        None => Source::Random {
            input: args.input_tokens,
            output: args.output_tokens,
            prefix: args.shared_prefix,
            groups: args.prefix_groups,
        },
    };
    let pace = match (args.rate, args.concurrency, &args.trace) {
        (Some(rate), ..) => Pace::Poisson(rate),
        (_, Some(concurrency), _) => Pace::Closed(concurrency.max(1)),
        (_, _, Some(_)) => Pace::Recorded(args.trace_speed),
        _ => Pace::Closed(4),
    };
    Ok(Workload {
        source,
        pace,
        caps: Caps {
            input: args.max_input_tokens.unwrap_or(usize::MAX).max(1),
            output: args.max_output_tokens.unwrap_or(usize::MAX).max(1),
            context: max_context.unwrap_or(usize::MAX),
        },
        vocabulary: args.vocabulary,
        text: args.text,
        seed: args.seed,
    })
}

fn until(args: &ServeArgs, workload: &Workload) -> Until {
    let requests = match (&workload.source, args.duration) {
        (Source::Trace(entries), _) => entries.len().min(args.requests.unwrap_or(usize::MAX)),
        (_, Some(_)) => args.requests.unwrap_or(usize::MAX),
        _ => args.requests.unwrap_or(REQUESTS),
    };
    Until { requests, duration: args.duration.map(Duration::from_secs_f64) }
}

/// Opens connections and fills caches of the service's own; prompts of another seed, so that none is answered from a
/// prefix cache later.
async fn warm_up(args: &ServeArgs, client: &Client, template: &Template, workload: &Workload) -> Result<()> {
    let other = Workload { seed: !args.seed, ..workload.clone() };
    for planned in other.requests().take(args.warmup) {
        let outcome = client::execute(client, template, &planned, Instant::now()).await;
        if let Some(failure) = outcome.failure {
            let advice = if args.text { "" } else { " (a service that takes no token ids: --text)" };
            bail!("the first request failed with {}: {}{advice}", failure.status, failure.message);
        }
    }
    Ok(())
}

fn describe(args: &ServeArgs, pace: Pace) -> String {
    let what = match &args.trace {
        Some(path) => format!("trace {}", path.display()),
        None if args.shared_prefix > 0 => {
            format!(
                "random prompts after {} shared tokens in {} groups",
                args.shared_prefix, args.prefix_groups
            )
        }
        None => "random prompts".to_owned(),
    };
    match pace {
        Pace::Poisson(rate) => format!("{what}, Poisson arrivals at {rate}/s"),
        Pace::Recorded(speed) => format!("{what}, recorded arrivals × {speed}"),
        Pace::Closed(concurrency) => format!("{what}, {concurrency} at any time"),
    }
}
