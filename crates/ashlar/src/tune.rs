//! `ashlar tune`: a fine-tuning job from the terminal: upload, create, follow.

mod download;
mod show;

use crate::http::{Client, DEFAULT_URL, GatewayArgs};
use crate::roles;
use anyhow::{Context, Result, bail};
use ashlar_service_kit::Shutdown;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use show::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Before a job is followed again whose stream broke off.
const PAUSE: Duration = Duration::from_secs(1);

/// Within so many bytes the first example is looked at: no line of a training file may be longer.
const FIRST_BYTES_MAX: u64 = 8 << 20;

/// The job was cancelled: neither a success nor a failure.
#[derive(Debug, thiserror::Error)]
#[error("the job {0} was cancelled")]
pub(crate) struct Cancelled(String);

/// Arguments of `ashlar tune`.
#[derive(Debug, Args)]
#[command(after_help = "FILE has one example per line, as OpenAI's fine-tuning takes them:
  {\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]}
  {\"prompt\": \"…\", \"completion\": \"…\"}   or   {\"text\": \"…\"}
  {\"input\": {\"messages\": […]}, \"preferred_output\": […], \"non_preferred_output\": […]}
At least 10 of them. The last form is learnt by direct preference optimisation (--method dpo): to give the one answer
rather than the other, while staying close to the model as it is, the closer the larger --beta.

Examples:
  ashlar tune train.jsonl                           on the cluster that `ashlar up` started, and watch
  ashlar tune train.jsonl --epochs 3 --suffix mine  the model is then called ft:MODEL:…:mine:…
  ashlar tune train.jsonl --validation valid.jsonl --rank 8 --lr 1e-4
  ashlar tune preferences.jsonl --method dpo --beta 0.2
  ashlar tune train.jsonl --full --download new     trains all weights; then: ashlar up --model new
  ashlar tune train.jsonl --suffix mine --promote exact_match --eval held-out.jsonl
                                                    served as ft:MODEL:…:mine only if it answers more of the held-out
                                                    examples right than what is served there now
  ashlar tune train.jsonl --detach                  prints the job's id and ends
  ashlar tune --follow ftjob-…                      watches a job again
  ashlar tune --list
  ashlar tune --cancel ftjob-…
  ashlar tune --follow ftjob-… --download ./mine    also writes its adapter, which PEFT loads, and results.csv
While it watches, Ctrl-C detaches: the job goes on. Exit code: 0 succeeded (or detached), 1 failed, 3 cancelled.")]
pub(crate) struct TuneArgs {
    /// Examples to train on, one JSON object per line.
    #[arg(value_name = "FILE", required_unless_present_any = ["list", "cancel", "follow"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Model to start from; default: the first that is served.
    #[arg(long)]
    model: Option<String>,
    /// Part of the fine-tuned model's name.
    #[arg(long)]
    suffix: Option<String>,
    /// How to learn from the examples; default: as the first one asks for.
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Of dpo: how closely the model stays at the one that it starts from, up to 2; default: 0.1.
    #[arg(long, value_name = "BETA")]
    beta: Option<f64>,
    /// How often every example is trained; default: by the size of the file.
    #[arg(long, value_name = "N")]
    epochs: Option<u32>,
    /// Samples of a step; default: by the size of the file.
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Highest learning rate; default: 2e-4, for dpo 2e-5, with --full 1e-5, from random weights 1e-3.
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Rank of the adapter; default: 16.
    #[arg(long, value_name = "N")]
    rank: Option<u32>,
    /// Train all weights of a copy of the model instead of an adapter. The result is files, which are not served by themselves.
    #[arg(long, conflicts_with = "rank")]
    full: bool,
    /// What the copy starts from.
    #[arg(long, value_enum, requires = "full")]
    init: Option<Init>,
    /// The learning rate's course; default: linear.
    #[arg(long, value_name = "SHAPE", value_parser = ["constant", "linear", "cosine", "late"])]
    schedule: Option<String>,
    /// Decoupled weight decay; default: 0.
    #[arg(long, value_name = "RATE")]
    weight_decay: Option<f64>,
    /// Once the job has succeeded, write its files to this directory: an adapter as PEFT loads it, or with --full a model, and the
    /// table of steps. Works with --follow, too.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["detach", "list", "cancel"])]
    download: Option<PathBuf>,
    /// Examples to measure on, never trained.
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// Serve the finished adapter only if it is better, by this, than what its name serves now, or than the model where that is
    /// nothing. With --suffix, jobs of one suffix share a name.
    #[arg(long, value_enum, value_name = "METRIC", conflicts_with = "full")]
    promote: Option<Promote>,
    /// Of --promote: examples to compare on, never trained; default: those of --validation.
    #[arg(long, value_name = "FILE", requires = "promote")]
    eval: Option<PathBuf>,
    /// Of --promote exact_match: the share of right answers, 0 to 1, that the adapter has to reach besides.
    #[arg(long, value_name = "SHARE", requires = "promote", conflicts_with = "at_most")]
    at_least: Option<f64>,
    /// Of --promote loss: the loss that the adapter may have at most.
    #[arg(long, value_name = "LOSS", requires = "promote")]
    at_most: Option<f64>,
    /// Of the order and of the adapter's start: the same seed, file and settings give the same bits.
    #[arg(long)]
    seed: Option<u32>,
    /// Watch the job until it ends (the default).
    #[arg(long, conflicts_with = "detach")]
    watch: bool,
    /// End once the job is created.
    #[arg(long)]
    detach: bool,
    /// Events and jobs as JSON, one per line.
    #[arg(long)]
    json: bool,
    /// List jobs, the newest first.
    #[arg(long, conflicts_with_all = ["file", "cancel", "follow"])]
    list: bool,
    /// Cancel a job.
    #[arg(long, value_name = "ID", conflicts_with_all = ["file", "follow"])]
    cancel: Option<String>,
    /// Watch a job that exists.
    #[arg(long, value_name = "ID", conflicts_with = "file")]
    follow: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// To give the examples' answers.
    Supervised,
    /// To prefer one answer to another.
    Dpo,
}

/// By what a finished adapter is compared with what is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Promote {
    /// The share of held-out answers that it gives to the letter.
    ExactMatch,
    /// The loss on held-out examples.
    Loss,
}

/// The files of a job, by their ids.
struct Uploaded {
    training: String,
    validation: Option<String>,
    evaluation: Option<String>,
}

/// What a copy of the model starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Init {
    /// The served model's weights.
    Model,
    /// Random weights, by the seed.
    Random,
}

pub(crate) fn run(args: TuneArgs) -> Result<()> {
    roles::runtime()?.block_on(async {
        let client = args.gateway.client()?;
        if args.list {
            return list(&client, &args).await;
        }
        if let Some(id) = &args.cancel {
            return cancel(&client, &args, id).await;
        }
        let job = match (&args.follow, &args.file) {
            (Some(id), _) => client.get_ok(&job_path(id)?).await?,
            (None, Some(file)) => create(&client, &args, file).await?,
            (None, None) => bail!("name a file to train on: see ashlar tune --help"),
        };
        if args.detach {
            return detached(&args, &job);
        }
        watch(&client, &args, job).await
    })
}

async fn list(client: &Client, args: &TuneArgs) -> Result<()> {
    let mut after = String::new();
    let mut any = false;
    loop {
        let page = client.get_ok(&format!("/v1/fine_tuning/jobs?limit=100{after}")).await?;
        for job in page["data"].as_array().into_iter().flatten() {
            any = true;
            println!("{}", if args.json { job.to_string() } else { show::job_line(job) });
        }
        match page["last_id"].as_str() {
            Some(last) if page["has_more"] == true => after = format!("&after={last}"),
            _ => break,
        }
    }
    if !any && !args.json {
        println!("no jobs yet: ashlar tune FILE creates one");
    }
    Ok(())
}

async fn cancel(client: &Client, args: &TuneArgs, id: &str) -> Result<()> {
    let job = client.post(&format!("{}/cancel", job_path(id)?), &json!({})).await?;
    println!("{}", if args.json { job.to_string() } else { show::job_line(&job) });
    Ok(())
}

async fn create(client: &Client, args: &TuneArgs, file: &Path) -> Result<Value> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(client).await?,
    };
    let method = chosen_method(args, file)?;
    let mut files =
        Uploaded { training: upload(client, args, file).await?, validation: None, evaluation: None };
    if let Some(file) = &args.validation {
        files.validation = Some(upload(client, args, file).await?);
    }
    if let Some(file) = &args.eval {
        files.evaluation = Some(upload(client, args, file).await?);
    }
    let body = request(args, method, &model, files);
    client.post("/v1/fine_tuning/jobs", &body).await
}

/// The method that was named, or the one that the file's first example is for.
fn chosen_method(args: &TuneArgs, file: &Path) -> Result<Method> {
    let method = match args.method {
        Some(method) => method,
        None => {
            let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
            method_of(opened).with_context(|| format!("cannot read {}", file.display()))?
        }
    };
    if args.beta.is_some() && method != Method::Dpo {
        bail!("--beta is of preferences: give a file of them, or leave it out");
    }
    Ok(method)
}

/// Which method takes the first example. What cannot be read is left to the gateway, which names its line.
fn method_of(examples: impl Read) -> std::io::Result<Method> {
    for line in BufReader::new(examples.take(FIRST_BYTES_MAX)).split(b'\n') {
        let line = line?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let example: Value = serde_json::from_slice(&line).unwrap_or_default();
        let of_pairs =
            ["preferred_output", "non_preferred_output"].iter().any(|name| example.get(name).is_some());
        return Ok(if of_pairs { Method::Dpo } else { Method::Supervised });
    }
    Ok(Method::Supervised)
}

/// The body that creates the job. What was not chosen is left to the gateway.
fn request(args: &TuneArgs, method: Method, model: &str, files: Uploaded) -> Value {
    let mut hyperparameters = json!({});
    if let Some(beta) = args.beta {
        hyperparameters["beta"] = beta.into();
    }
    let numbers = [("n_epochs", args.epochs), ("batch_size", args.batch_size)];
    for (name, number) in numbers {
        if let Some(number) = number {
            hyperparameters[name] = number.into();
        }
    }
    let method = match method {
        Method::Supervised => "supervised",
        Method::Dpo => "dpo",
    };
    let mut body = json!({
        "model": model,
        "training_file": files.training,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
    });
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            body[name] = value;
        }
    };
    put("validation_file", files.validation.map(Value::from));
    put("promote", args.promote.map(|metric| promotion(args, metric, files.evaluation)));
    put("suffix", args.suffix.clone().map(Value::from));
    put("seed", args.seed.map(Value::from));
    put("learning_rate", args.lr.map(Value::from));
    put("lora", args.rank.map(|rank| json!({"r": rank})));
    put("full", args.full.then_some(Value::Bool(true)));
    put(
        "init",
        args.init.map(|init| match init {
            Init::Model => "model".into(),
            Init::Random => "random".into(),
        }),
    );
    put("schedule", args.schedule.clone().map(Value::from));
    put("weight_decay", args.weight_decay.map(Value::from));
    body
}

/// When the finished adapter is to be served.
fn promotion(args: &TuneArgs, metric: Promote, file: Option<String>) -> Value {
    let metric = match metric {
        Promote::ExactMatch => "exact_match",
        Promote::Loss => "loss",
    };
    let mut promote = json!({"metric": metric});
    let bounds = [("at_least", args.at_least), ("at_most", args.at_most)];
    let bounds = bounds.into_iter().map(|(name, bound)| (name, bound.map(Value::from)));
    for (name, value) in bounds.chain([("file", file.map(Value::from))]) {
        if let Some(value) = value {
            promote[name] = value;
        }
    }
    promote
}

/// The first model that is no adapter.
pub(crate) async fn first_model(client: &Client) -> Result<String> {
    let models = client.get_ok("/v1/models").await?;
    let mut cards = models["data"].as_array().into_iter().flatten();
    match cards.find(|card| card["parent"].is_null()).and_then(|card| card["id"].as_str()) {
        Some(id) => Ok(id.to_owned()),
        None => bail!("the gateway lists no model: name one with --model"),
    }
}

/// Uploads a file and gives its id.
async fn upload(client: &Client, args: &TuneArgs, file: &Path) -> Result<String> {
    let name = file.file_name().map_or_else(|| "file".into(), |name| name.to_string_lossy().into_owned());
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    bar.set_style(
        ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
            .context("progress bar")?,
    );
    bar.set_message(format!("uploading {name}"));
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let answer = client.upload("/v1/files", &[("purpose", "fine-tune")], &name, opened, &bar).await;
    bar.finish_and_clear();
    let answer = answer.with_context(|| format!("cannot upload {}", file.display()))?;
    match answer["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => bail!("the gateway gave the file no id"),
    }
}

/// Follows a job until it ends, or Ctrl-C.
async fn watch(client: &Client, args: &TuneArgs, job: Value) -> Result<()> {
    let shutdown = Shutdown::listen().context("cannot listen to signals")?;
    let mut display = Display::new(args.json)?;
    display.job(&job);
    let following = follow(client, &job, &mut display);
    let ended = tokio::select! {
        ended = following => Some(ended?),
        _ = shutdown.requested() => None,
    };
    display.close();
    match ended {
        Some(job) => outcome(client, args, &job).await,
        None => detached(args, &job),
    }
}

/// Shows events until the job has ended, and gives it.
async fn follow(client: &Client, job: &Value, display: &mut Display) -> Result<Value> {
    let path = job_path(job["id"].as_str().unwrap_or_default())?;
    let mut after = String::new();
    loop {
        let broken = match client.follow(&format!("{path}/events?stream=true{after}")).await {
            Ok(mut events) => loop {
                match events.next().await {
                    Ok(Some(event)) => {
                        if let Some(id) = event["id"].as_str() {
                            after = format!("&after={id}");
                        }
                        display.event(&event);
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            },
            Err(error) => Some(error),
        };
        // A gateway that restarts loses nothing: the events are the scheduler's.
        match client.get_ok(&path).await {
            Ok(job) if is_final(&job) => return Ok(job),
            Ok(_) => {}
            Err(error) if crate::http::is_refusal(&error) => return Err(error),
            Err(error) => display.trouble(&broken.unwrap_or(error)),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn is_final(job: &Value) -> bool {
    matches!(job["status"].as_str(), Some("succeeded" | "failed" | "cancelled"))
}

async fn outcome(client: &Client, args: &TuneArgs, job: &Value) -> Result<()> {
    let id = job["id"].as_str().unwrap_or_default();
    if args.json {
        println!("{job}");
    }
    match job["status"].as_str() {
        Some("succeeded") => {
            if let Some(directory) = &args.download {
                download::download(client, job, directory, args.json).await?;
            }
            if !args.json {
                tell_what_to_do(args, job, id);
            }
            Ok(())
        }
        Some("cancelled") => Err(Cancelled(id.to_owned()).into()),
        _ => bail!(
            "the job {id} failed: {}",
            job["error"]["message"].as_str().unwrap_or("no reason was given")
        ),
    }
}

/// What can be done with what a job has made.
fn tell_what_to_do(args: &TuneArgs, job: &Value, id: &str) {
    let url = url_option(args);
    let candidate = job["ashlar"]["promotion"]["candidate"].as_str();
    if let Some(model) = job["fine_tuned_model"].as_str() {
        println!("{model}");
        eprintln!("\nTalk to it:\n  ashlar chat --model {model}{url}");
    } else if let Some(candidate) = candidate {
        // Why, the last event has said.
        let name = job["ashlar"]["promotion"]["model"].as_str().unwrap_or_default();
        eprintln!("\nIt is not served as {name}. Talk to the candidate:");
        eprintln!("  ashlar chat --model {candidate}{url}");
    } else if let Some(directory) = &args.download {
        eprintln!("\nServe it:\n  ashlar up --model {}", directory.display());
    } else {
        eprintln!("\nFetch the model:\n  ashlar tune --follow {id} --download DIR{url}");
    }
}

fn detached(args: &TuneArgs, job: &Value) -> Result<()> {
    let id = job["id"].as_str().unwrap_or_default();
    if args.json {
        println!("{job}");
        return Ok(());
    }
    println!("{id}");
    let url = url_option(args);
    eprintln!("\nThe job goes on.\n  ashlar tune --follow {id}{url}\n  ashlar tune --cancel {id}{url}");
    Ok(())
}

fn url_option(args: &TuneArgs) -> String {
    if args.gateway.url == DEFAULT_URL { String::new() } else { format!(" --url {}", args.gateway.url) }
}

/// Where a job is. What is no id must not become another path.
fn job_path(id: &str) -> Result<String> {
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        bail!("`{id}` is no job's id: ashlar tune --list shows them");
    }
    Ok(format!("/v1/fine_tuning/jobs/{id}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        tune: TuneArgs,
    }

    fn parse(line: &str) -> Result<TuneArgs, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.tune)
    }

    #[test]
    fn what_is_not_chosen_is_left_to_the_gateway() {
        let files = |validation: Option<&str>| Uploaded {
            training: "file-1".into(),
            validation: validation.map(str::to_owned),
            evaluation: Some("file-3".into()),
        };
        let body = request(&parse("tune f.jsonl").unwrap(), Method::Supervised, "m", files(None));
        let method = json!({"type": "supervised", "supervised": {"hyperparameters": {}}});
        assert_eq!(body, json!({"model": "m", "training_file": "file-1", "method": method}));
        let args = parse("tune f --method dpo --beta 0.5 --epochs 2 --rank 8 --lr 1e-4 --seed 7 --suffix s")
            .unwrap();
        let body = request(&args, args.method.unwrap(), "m", files(Some("file-2")));
        assert_eq!(body["method"]["type"], "dpo");
        assert_eq!(body["method"]["dpo"]["hyperparameters"], json!({"n_epochs": 2, "beta": 0.5}));
        assert_eq!(
            (&body["lora"]["r"], &body["learning_rate"], &body["seed"]),
            (&json!(8), &json!(1e-4), &json!(7))
        );
        assert_eq!((&body["validation_file"], &body["suffix"]), (&json!("file-2"), &json!("s")));
        let full = parse("tune f --full --init random").unwrap();
        let body = request(&full, Method::Supervised, "m", files(None));
        assert_eq!(
            (&body["full"], &body["init"], &body["lora"]),
            (&json!(true), &json!("random"), &Value::Null)
        );
        let promote = parse("tune f --promote exact_match --eval e --at-least 0.5").unwrap();
        let body = request(&promote, Method::Supervised, "m", files(None));
        assert_eq!(body["promote"], json!({"metric": "exact_match", "file": "file-3", "at_least": 0.5}));
    }

    #[test]
    fn a_file_of_preferences_is_learnt_as_such() {
        let method = |text: &str| method_of(text.as_bytes()).unwrap();
        let preference = r#"{"input": {}, "preferred_output": [], "non_preferred_output": []}"#;
        assert_eq!(method(preference), Method::Dpo);
        assert_eq!(method(&format!("\n \r\n{preference}\r\n{{")), Method::Dpo);
        for other in
            ["", "\n", "no json", "[]", r#"{"text": "preferred_output"}"#, &format!("{{}}\n{preference}")]
        {
            assert_eq!(method(other), Method::Supervised, "{other}");
        }
        // What was named counts, and no file is looked at.
        let nowhere = Path::new("/nowhere");
        assert_eq!(chosen_method(&parse("tune f --method dpo").unwrap(), nowhere).unwrap(), Method::Dpo);
        assert!(chosen_method(&parse("tune f --method supervised --beta 0.2").unwrap(), nowhere).is_err());
    }

    #[test]
    fn a_command_names_one_thing_to_do() {
        assert!(parse("tune").is_err());
        assert!(parse("tune f --list").is_err());
        assert!(parse("tune f --watch --detach").is_err());
        assert!(parse("tune --download d").is_err() && parse("tune f --detach --download d").is_err());
        assert!(parse("tune --follow ftjob-1 --download d").is_ok());
        assert!(parse("tune f --full --rank 8").is_err() && parse("tune f --init random").is_err());
        assert!(parse("tune --list").is_ok() && parse("tune --cancel ftjob-1").is_ok());
        assert!(parse("tune f --eval e").is_err() && parse("tune f --full --promote loss").is_err());
        assert!(parse("tune f --promote loss --at-least 0.5 --at-most 2").is_err());
        assert!(job_path("../../admin").is_err());
    }
}
