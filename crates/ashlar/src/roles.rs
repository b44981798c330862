//! One role per process: load its configuration, start telemetry, serve until asked to end.

use crate::enrolment::endpoint::{self, EnrolmentConfig};
use crate::enrolment::join::{self, JoinArgs};
use crate::tune;
use anyhow::{Context, Result};
use ashlar_gateway::{Gateway, GatewayConfig};
use ashlar_model::{ModelConfig, WeightFiles, digest, hub};
use ashlar_protocol::models::DeployModel;
use ashlar_scheduler::{ModelCard, Scheduler, SchedulerConfig, SchedulerError};
use ashlar_service_kit::telemetry::{self, TelemetryConfig, TelemetryGuard};
use ashlar_service_kit::{Shutdown, config};
use ashlar_shard_node::{NodeConfig, NodeError};
use ashlar_vocabulary::Precision;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Exit code of a process that will fail the same way when started again: a supervisor gives up.
pub(crate) const EXIT_PERMANENT: u8 = 2;

/// Exit code of `ashlar tune` for a job that was cancelled.
const EXIT_CANCELLED: u8 = 3;

/// Arguments of every role.
#[derive(Debug, Args)]
#[command(after_help = "Commented examples are in configs/. Logs: ASHLAR_LOG=debug, or for example \
    ASHLAR_LOG=ashlar_scheduler=debug,info.")]
pub(crate) struct RoleArgs {
    /// The role's configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Arguments of `ashlar node`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar node --config node.toml
                                           a node of a cluster whose processes are started by hand
  ashlar node --join 10.0.0.1:7400 --token ashlar1…
                                           this machine joins a cluster: the line that `ashlar up --join-listen` prints there
  ashlar node --join 10.0.0.1:7400 --token ashlar1… --name rack-7 --memory 8GiB --model ./llama-3.2-1b
                                           under a name of its own, with so much memory, and the model from here
  ashlar node                              the same node again, from ./.ashlar-node: no token is needed any more")]
pub(crate) struct NodeArgs {
    /// The node's configuration file (TOML), instead of the options below.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    join: JoinArgs,
}

/// An error that starting again cannot mend.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Permanent(#[from] anyhow::Error);

/// Which exit code an error ends the process with.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<tune::Cancelled>() {
        return EXIT_CANCELLED;
    }
    if error.chain().any(|cause| cause.is::<Permanent>()) { EXIT_PERMANENT } else { 1 }
}

pub(crate) fn permanent<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| anyhow::Error::new(Permanent(error)))
}

fn load<C: serde::de::DeserializeOwned>(args: &RoleArgs) -> Result<C> {
    permanent(config::load(&args.config).map_err(anyhow::Error::from))
}

fn start(role: &str, otlp_endpoint: Option<String>) -> Result<TelemetryGuard> {
    let config = TelemetryConfig { otlp_endpoint, ..TelemetryConfig::default() };
    permanent(telemetry::init(role, &config).map_err(anyhow::Error::from))
}

/// A runtime of few threads: roles wait for sockets, computing happens on threads of its own.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")
}

pub(crate) fn resolve(model: &str) -> Result<PathBuf> {
    permanent(
        hub::resolve(model, &mut |file| tracing::info!("fetching {file} of {model}"))
            .map_err(anyhow::Error::from),
    )
}

pub(crate) fn gateway(args: &RoleArgs) -> Result<()> {
    let config: GatewayConfig = load(args)?;
    let _telemetry = start("gateway", config.otlp_endpoint.clone())?;
    let directory = resolve(&config.model)?;
    runtime()?.block_on(async {
        let shutdown = Shutdown::listen().context("cannot listen to signals")?;
        let bound = Gateway::bind(config, &directory).await;
        let gateway = permanent(bound.map_err(anyhow::Error::from))?;
        gateway.finding(Arc::new(find)).run(shutdown).await;
        Ok(())
    })
}

pub(crate) fn scheduler(args: &RoleArgs) -> Result<()> {
    let config: SchedulerConfig = load(args)?;
    let _telemetry = start("scheduler", config.otlp_endpoint.clone())?;
    let card = permanent(model_card(&config.model, config.precision(), config.max_context_tokens))?;
    runtime()?.block_on(async {
        let shutdown = Shutdown::listen().context("cannot listen to signals")?;
        let asked = async move {
            shutdown.requested().await;
        };
        let (precision, context) = (config.precision(), config.max_context_tokens);
        let opener =
            move |wish: &DeployModel| open(wish, precision, context).map_err(|error| format!("{error:#}"));
        let serving =
            async { Scheduler::bind(config, card).await?.opening(Arc::new(opener)).run(asked).await };
        match serving.await {
            // A store that is away for a moment is worth another start.
            Err(SchedulerError::Store(error)) if error.is_retryable() => {
                Err(anyhow::Error::new(SchedulerError::Store(error)))
            }
            result => permanent(result.map_err(anyhow::Error::from)),
        }
    })
}

pub(crate) fn node(args: &NodeArgs) -> Result<()> {
    let runtime = runtime()?;
    // What is held is held until the process ends.
    let (config, _held) = match &args.config {
        Some(file) => (load(&RoleArgs { config: file.clone() })?, None),
        None => {
            let enrolled = runtime.block_on(join::prepare(&args.join))?;
            (enrolled.config, Some(enrolled._held))
        }
    };
    let config: NodeConfig = config;
    let _telemetry = start("node", config.otlp_endpoint.clone())?;
    runtime.block_on(async {
        let shutdown = Shutdown::listen().context("cannot listen to signals")?;
        let asked = async move {
            shutdown.requested().await;
        };
        match ashlar_shard_node::serve(config, asked).await {
            // Started again, it computes the next request.
            Err(error @ NodeError::Crashed) => Err(error.into()),
            result => permanent(result.map_err(anyhow::Error::from)),
        }
    })
}

pub(crate) fn enrolment(args: &RoleArgs) -> Result<()> {
    let config: EnrolmentConfig = load(args)?;
    let _telemetry = start("enrolment", None)?;
    runtime()?.block_on(async {
        let shutdown = Shutdown::listen().context("cannot listen to signals")?;
        let asked = async move {
            shutdown.requested().await;
        };
        endpoint::serve(config, asked).await
    })
}

/// Where the files of a model are on this machine; those of a hub are fetched.
fn find(model: &str) -> Result<PathBuf, String> {
    hub::resolve(model, &mut |file| tracing::info!("fetching {file} of {model}"))
        .map_err(|error| error.to_string())
}

/// What the scheduler must know of a model that is to be deployed beside its own, which has this precision and this limit.
fn open(wish: &DeployModel, own: Precision, context: Option<u32>) -> Result<ModelCard> {
    let precision = Precision { quantization: wish.quantize, ..own };
    // Other processes run elsewhere: a directory has one name for all of them.
    let model = match Path::new(&wish.model) {
        path if path.exists() => std::fs::canonicalize(path)?.to_string_lossy().into_owned(),
        _ => wish.model.clone(),
    };
    let card = model_card(&model, precision, wish.max_context_tokens.or(context))?;
    // What is cut short is told now, and not by nodes that have given up another place for it.
    WeightFiles::open(&resolve(&model)?)?;
    Ok(card)
}

/// What the scheduler must know of a model, read from its files.
pub(crate) fn model_card(
    model: &str,
    precision: Precision,
    max_context_tokens: Option<u32>,
) -> Result<ModelCard> {
    let directory = resolve(model)?;
    let config = ModelConfig::open(&directory, precision)?;
    let trained = u32::try_from(config.shape.max_position_embeddings).unwrap_or(u32::MAX);
    let digest = digest::model_digest(&directory, precision)?;
    Ok(ModelCard {
        source: model.to_owned(),
        precision,
        digest,
        max_context_tokens: max_context_tokens.unwrap_or(trained).min(trained),
        shape: config.shape,
    })
}
