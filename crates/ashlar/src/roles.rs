//! One role per process: load its configuration, start telemetry, serve until asked to end.

use crate::enrolment::endpoint;
use crate::enrolment::join::{self, JoinArgs};
use crate::settings::{self, ConfigRole, SettingArgs};
use crate::tune;
use anyhow::{Context, Result, anyhow, bail};
use ashlar_gateway::{Gateway, GatewayConfig};
use ashlar_model::{ModelConfig, WeightFiles, digest, hub};
use ashlar_protocol::models::DeployModel;
use ashlar_scheduler::{ModelCard, Scheduler, SchedulerConfig, SchedulerError};
use ashlar_service_kit::Shutdown;
use ashlar_service_kit::telemetry::{self, TelemetryConfig, TelemetryGuard};
use ashlar_shard_node::{NodeConfig, NodeError};
use ashlar_vocabulary::Precision;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How lines of the log look: `text` or `json`.
const FORMAT_VARIABLE: &str = "ASHLAR_LOG_FORMAT";
/// The share of traces that are kept, where they are sent anywhere.
const SHARE_VARIABLE: &str = "ASHLAR_TRACE_SHARE";

/// Exit code of a process that will fail the same way when started again: a supervisor gives up.
pub(crate) const EXIT_PERMANENT: u8 = 2;

/// How long the scheduler's address may be unknown when a node starts.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(60);
const ADDRESS_PAUSE: Duration = Duration::from_millis(500);

/// Exit code of `ashlar tune` for a job that was cancelled.
const EXIT_CANCELLED: u8 = 3;

/// Arguments of every role.
#[derive(Debug, Args)]
#[command(
    after_help = "Flags go before the environment, that before the file, and that before defaults. Examples:
  ashlar gateway --config gateway.toml
  ashlar gateway --config gateway.toml --set listen=0.0.0.0:8080
  ASHLAR_GATEWAY__MODEL=/models/m ASHLAR_GATEWAY__SCHEDULER=scheduler:7402 ashlar gateway
  ASHLAR_SCHEDULER__STORE_FILE=/run/secrets/store ashlar scheduler --config scheduler.toml
                                           a value from a file, for secrets
All keys: `ashlar config schema ROLE`; what holds and where it comes from: `ashlar config show ROLE`. Commented examples are in configs/.
Logs: ASHLAR_LOG=debug, or for example ASHLAR_LOG=ashlar_scheduler=debug,info; ASHLAR_LOG_FORMAT=json for a JSON object a line."
)]
pub(crate) struct RoleArgs {
    #[command(flatten)]
    settings: SettingArgs,
}

/// Arguments of `ashlar node`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar node --config node.toml
                                           a node of a cluster whose processes are started by hand
  ASHLAR_NODE__SCHEDULER=scheduler:7401 ashlar node --set listen=0.0.0.0:7410 --set allow_plaintext=true
                                           the same without a file: `ashlar config schema node` lists all keys
  ashlar node --join 10.0.0.1:7400 --token ashlar1…
                                           this machine joins a cluster: the line that `ashlar up --join-listen` prints there
  ashlar node --join 10.0.0.1:7400 --token ashlar1… --name rack-7 --memory 8GiB --model ./llama-3.2-1b
                                           under a name of its own, with so much memory, and the model from here
  ashlar node                              the same node again, from ./.ashlar-node: no token is needed any more")]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    settings: SettingArgs,
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

fn load<C: serde::de::DeserializeOwned>(role: ConfigRole, args: &RoleArgs) -> Result<C> {
    permanent(settings::draft(role, &args.settings).and_then(|draft| Ok(draft.finish()?)))
}

fn start(role: &str, otlp_endpoint: Option<String>) -> Result<TelemetryGuard> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let json = permanent(log_format(set(FORMAT_VARIABLE).as_deref()))?;
    let trace_share = permanent(trace_share(set(SHARE_VARIABLE).as_deref()))?;
    let config = TelemetryConfig { json, otlp_endpoint, trace_share };
    permanent(telemetry::init(role, &config).map_err(anyhow::Error::from))
}

/// Whether logs are JSON.
fn log_format(wanted: Option<&str>) -> Result<bool> {
    match wanted {
        None | Some("text") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => bail!("{FORMAT_VARIABLE} is `{other}`: set it to text or json"),
    }
}

/// The share of traces that are kept.
fn trace_share(wanted: Option<&str>) -> Result<f64> {
    let Some(text) = wanted else { return Ok(TelemetryConfig::default().trace_share) };
    let share = text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    share.with_context(|| format!("{SHARE_VARIABLE} is `{text}`: set it to a share from 0 to 1"))
}

/// Most threads of a runtime.
const RUNTIME_THREADS_MAX: usize = 4;

/// A runtime of few threads: roles wait for sockets, computing happens on threads of its own. Where cores are few they are the
/// computing's: threads that wake each other for every message take a twentieth of what two cores can do.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).clamp(1, RUNTIME_THREADS_MAX))
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
    let config: GatewayConfig = load(ConfigRole::Gateway, args)?;
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
    let config: SchedulerConfig = load(ConfigRole::Scheduler, args)?;
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
    let (config, _held) = if settings::configures_node(&args.settings) {
        if args.join.is_given() {
            return permanent(Err(anyhow!(
                "a node that joins is configured by its options alone: leave ASHLAR_NODE__… and --set away"
            )));
        }
        (configured_node(&args.settings)?, None)
    } else {
        let enrolled = runtime.block_on(join::prepare(&args.join))?;
        (enrolled.config, Some(enrolled._held))
    };
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

/// A node's configuration. Its address on the way to the scheduler may take a while to be known: where containers start together, names
/// come with them.
fn configured_node(args: &SettingArgs) -> Result<NodeConfig> {
    let mut draft = permanent(settings::draft(ConfigRole::Node, args))?;
    permanent(settings::supply_name(&mut draft))?;
    let started = Instant::now();
    while let Err(error) = settings::supply_address(&mut draft) {
        if started.elapsed() > ADDRESS_PATIENCE {
            return Err(error.context("set `advertise_host`, the host that other nodes reach this one at"));
        }
        std::thread::sleep(ADDRESS_PAUSE);
    }
    permanent(draft.finish().map_err(anyhow::Error::from))
}

pub(crate) fn enrolment(args: &RoleArgs) -> Result<()> {
    let config = load(ConfigRole::Enrolment, args)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_wrongly_is_said_with_what_may_be_set() {
        assert!(matches!((log_format(None), log_format(Some("json"))), (Ok(false), Ok(true))));
        assert!(log_format(Some("xml")).is_err_and(|error| error.to_string().contains("text or json")));
        assert!(matches!(trace_share(Some("0.25")), Ok(share) if share == 0.25));
        for wrong in ["2", "-1", "NaN", "all"] {
            assert!(trace_share(Some(wrong)).is_err_and(|error| error.to_string().contains("from 0 to 1")));
        }
    }
}
