//! `ashlar model`: which models a running cluster serves, and on how many nodes.

use crate::http::{Client, GatewayArgs};
use crate::roles;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often it is looked.
const POLL: Duration = Duration::from_millis(250);

/// Arguments of `ashlar model`.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    service: Service,
}

/// Which cluster, and how it is said.
#[derive(Debug, Args)]
struct Service {
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// How long to wait with --wait, in seconds.
    #[arg(long, global = true, value_name = "S", default_value_t = 600)]
    wait_s: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the models that are served, with their nodes.
    #[command(after_help = "Examples:
  ashlar model list               names, status, nodes
  ashlar model list --json        everything, for programs")]
    List,
    /// Serve another model beside the others, on nodes of its own.
    #[command(after_help = "Examples:
  ashlar model deploy ./qwen2.5-0.5b                     on one node that stands by, as `qwen2.5-0.5b`
  ashlar model deploy ./llama-3.2-1b --nodes 2 --wait    over two nodes; returns once it answers
  ashlar model deploy Qwen/Qwen2.5-0.5B-Instruct --name small --quantize q8_0
                                                         from the hub, under another name
It takes nodes that have no place. Where there are none: ashlar model scale NAME --nodes N for another model, or let machines join.
Clients name it in `model`.")]
    Deploy(DeployArgs),
    /// Give a model more nodes, or fewer.
    #[command(after_help = "Examples:
  ashlar model scale small --nodes 3         it takes nodes that stand by
  ashlar model scale ashlar-demo --nodes 2   the model that the cluster was started with keeps two; the others are free
  ashlar model scale ashlar-demo --all       it has whatever no other model has")]
    Scale(ScaleArgs),
    /// Serve a model no longer: requests in progress end, then its nodes are free.
    #[command(after_help = "Examples:
  ashlar model remove small
  ashlar model remove small --wait           returns once its nodes are free")]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
struct DeployArgs {
    /// Directory, GGUF file or hub id of the model, as the scheduler finds it.
    model: String,
    /// What clients call it; default: the last part of MODEL.
    #[arg(long)]
    name: Option<String>,
    /// Nodes that it is to have for itself; default: one for each rank.
    #[arg(long, value_name = "N")]
    nodes: Option<u32>,
    /// Pipeline stages; default: the fewest that fit.
    #[arg(long, value_name = "N")]
    stages: Option<u32>,
    /// Tensor-parallel ranks per stage.
    #[arg(long, value_name = "N")]
    tp: Option<u32>,
    /// Replicas; default: as many as its nodes can hold.
    #[arg(long, value_name = "N")]
    replicas: Option<u32>,
    /// Quantise the weights while they are loaded, for example q8_0.
    #[arg(long, value_name = "TYPE")]
    quantize: Option<String>,
    /// Longest sequence in tokens.
    #[arg(long, value_name = "TOKENS")]
    max_context: Option<u32>,
    /// Return once it serves.
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
struct ScaleArgs {
    /// The model's name.
    name: String,
    /// Nodes that it is to have.
    #[arg(long, value_name = "N", required_unless_present = "all")]
    nodes: Option<u32>,
    /// All that no other model has; for the model that the cluster was started with.
    #[arg(long, conflicts_with = "nodes")]
    all: bool,
    /// Return once it has them and serves.
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The model's name.
    name: String,
    /// Return once its nodes are free.
    #[arg(long)]
    wait: bool,
}

pub(crate) fn run(args: ModelArgs) -> Result<()> {
    roles::runtime()?.block_on(async {
        let client = args.service.gateway.client()?;
        let service = &args.service;
        match args.command {
            Command::List => list(&client, service).await,
            Command::Deploy(args) => deploy(&client, service, args).await,
            Command::Scale(args) => scale(&client, service, args).await,
            Command::Remove(args) => remove(&client, service, args).await,
        }
    })
}

async fn list(client: &Client, service: &Service) -> Result<()> {
    let models = client.get_ok("/admin/models").await?;
    if service.json {
        println!("{}", serde_json::to_string_pretty(&models["data"])?);
        return Ok(());
    }
    for model in models["data"].as_array().into_iter().flatten() {
        println!("{}", line(model));
    }
    Ok(())
}

/// What a person wants to know of a model.
fn line(model: &Value) -> String {
    let text = |key: &str| model[key].as_str().unwrap_or_default().to_owned();
    let members = model["members"].as_array().map(Vec::as_slice).unwrap_or_default();
    let members: Vec<&str> = members.iter().filter_map(Value::as_str).collect();
    let members = if members.is_empty() { "no node".to_owned() } else { members.join(", ") };
    let problem = model["problem"].as_str().map(|problem| format!(": {problem}")).unwrap_or_default();
    format!("{}  {}  on {members}  ({}){problem}", text("name"), text("status"), text("model"))
}

async fn deploy(client: &Client, service: &Service, args: DeployArgs) -> Result<()> {
    // A directory is meant from here, whatever the scheduler's own is; a hub id is no path.
    let path = Path::new(&args.model);
    let model = match path.exists() {
        true => std::fs::canonicalize(path)
            .with_context(|| format!("cannot find {}", path.display()))?
            .to_string_lossy()
            .into_owned(),
        false => args.model.clone(),
    };
    let wish = json!({
        "model": model,
        "name": args.name,
        "nodes": args.nodes,
        "stages": args.stages,
        "tensor_parallel_size": args.tp,
        "replicas": args.replicas,
        "quantize": args.quantize,
        "max_context_tokens": args.max_context,
    });
    let mut deployed = client.post("/admin/models", &wish).await?;
    let name = deployed["name"].as_str().unwrap_or_default().to_owned();
    if args.wait {
        deployed = until(client, service, &name, &format!("{name} is being loaded"), |model| {
            model.filter(|model| model["status"] == "serving").cloned()
        })
        .await?;
    }
    say(service, &deployed, &format!("{name}: {}", status(&deployed)))
}

async fn scale(client: &Client, service: &Service, args: ScaleArgs) -> Result<()> {
    let wish = json!({"nodes": args.nodes});
    let name = args.name;
    let mut scaled = client.patch(&path_of(&name), &wish).await?;
    if args.wait {
        scaled = until(client, service, &name, &format!("nodes come and go for {name}"), |model| {
            let model = model?;
            let members = model["members"].as_array().map_or(0, Vec::len) as u64;
            // The model of the cluster itself may make do with fewer.
            let enough = match model["own"] == true {
                true => model["nodes"].as_u64().is_none_or(|most| members <= most),
                false => model["nodes"] == members,
            };
            (enough && model["status"] == "serving" && model["problem"].is_null()).then(|| model.clone())
        })
        .await?;
    }
    say(service, &scaled, &format!("{name}: {}", status(&scaled)))
}

async fn remove(client: &Client, service: &Service, args: RemoveArgs) -> Result<()> {
    let name = args.name;
    let mut removed = client.delete(&path_of(&name)).await?;
    if args.wait {
        removed = until(client, service, &name, &format!("requests for {name} end"), |model| match model {
            None => Some(json!({"name": name, "status": "removed"})),
            Some(_) => None,
        })
        .await?;
    }
    say(service, &removed, &format!("{name}: {}", status(&removed)))
}

/// Polls until a model (or its absence) is as wanted.
async fn until(
    client: &Client,
    service: &Service,
    name: &str,
    message: &str,
    done: impl Fn(Option<&Value>) -> Option<Value>,
) -> Result<Value> {
    let bar = ProgressBar::new_spinner()
        .with_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").context("progress bar")?);
    bar.set_message(message.to_owned());
    let started = Instant::now();
    loop {
        let models = client.get_ok("/admin/models").await?;
        let models = models["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let model = models.iter().find(|model| model["name"] == name);
        if let Some(done) = done(model) {
            bar.finish_and_clear();
            return Ok(done);
        }
        if started.elapsed() > Duration::from_secs(service.wait_s) {
            let now = model.map_or_else(|| "it is not there".to_owned(), line);
            bail!("not so within {} s: {now}", service.wait_s);
        }
        bar.tick();
        tokio::time::sleep(POLL).await;
    }
}

fn path_of(name: &str) -> String {
    // Names have no other character that means something in a path; what is no name is refused.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    let escaped: String = name.chars().map(|c| if plain(c) { c.to_string() } else { percent(c) }).collect();
    format!("/admin/models/{escaped}")
}

fn percent(c: char) -> String {
    let mut bytes = [0; 4];
    c.encode_utf8(&mut bytes).bytes().map(|byte| format!("%{byte:02X}")).collect()
}

fn status(model: &Value) -> String {
    let status = model["status"].as_str().unwrap_or("unknown").to_owned();
    match model["problem"].as_str() {
        Some(problem) => format!("{status} ({problem})"),
        None => status,
    }
}

fn say(service: &Service, result: &Value, words: &str) -> Result<()> {
    match service.json {
        true => println!("{}", serde_json::to_string_pretty(result)?),
        false => println!("{words}"),
    }
    Ok(())
}
