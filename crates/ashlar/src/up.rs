//! `ashlar up`: a small real cluster on this machine. Every role is a supervised child process.

use crate::cache::CacheArgs;
use crate::demo;
use crate::edge::{Edge, EdgeArgs};
use crate::enrolment::endpoint::EnrolmentConfig;
use crate::enrolment::{
    self,
    opening::{Identities, Opening, from_here},
};
use crate::http::Client;
use crate::network::{self, Network};
use crate::port::ReservedPort;
use crate::precision::PrecisionArgs;
use crate::processes::{self, Processes};
use crate::roles;
use crate::supervisor::{Notice, Role, Supervised};
use anyhow::{Context, Result, bail};
use ashlar_gateway::GatewayConfig;
use ashlar_identity::Role as IdentityRole;
use ashlar_model::hub;
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::{Addresses, Shutdown, memory};
use ashlar_shard_node::config::CacheConfig;
use ashlar_shard_node::{NodeConfig, Pin};
use ashlar_vocabulary::{Bytes, NodeId};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;

/// A scheduler that hangs for this long is started again.
const SCHEDULER_SILENCE_MAX: Duration = Duration::from_secs(1);
/// A gateway that hangs for this long is started again.
const GATEWAY_SILENCE_MAX: Duration = Duration::from_secs(5);
/// Time that the gateway gets to let streams end, and the other roles to exit.
const DRAIN_GRACE: Duration = Duration::from_secs(40);
/// For a node whose place nobody can take.
const NODE_GRACE_MS: u64 = 10_000;
const EXIT_GRACE: Duration = Duration::from_secs(5);
/// How often the cluster is asked whether it is ready.
const POLL: Duration = Duration::from_millis(100);
/// Contexts longer than this must be asked for: KV cache for one whole sequence is reserved.
const DEFAULT_CONTEXT_MAX: u32 = 8192;

/// Arguments of `ashlar up`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar up                                        the demo model, cut over two nodes
  ashlar up --model ./llama-3.2-1b --stages 2      a directory with config.json and safetensors
  ashlar up --model Qwen/Qwen3-0.6B --tp 2         a hub id (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE are honoured)
  ashlar up --model ./llama-3.2-1b --quantize q4_k_m
                                                   weights in 4 to 6 bits, packed while they are loaded
  ashlar up --model ./llama-3.2-1b --quantize q4_k_m --cache
                                                   packed once: later starts read what the first one packed
  ashlar up --replicas 2 --nodes 5                 two replicas of two stages and one standby
  ashlar up --gateways 2 --schedulers 2 --store redis://127.0.0.1:6379/0
                                                   no role but Redis is there only once
  ashlar up --replicas 3 --audit 0.1%              of a thousand answers one is computed again elsewhere, bit for bit
  ashlar up --join-listen --stages 2 --nodes 1     half of the model here, half on a machine that joins
  ashlar up --keys                                 only for who has an API key; prints the first one
  ashlar up --listen 0.0.0.0:8080 --tls            for other machines too: HTTPS, and only who has an API key
  ashlar up --separate --nodes 3                   for drills that cut roles off from each other")]
pub(crate) struct UpArgs {
    /// Model directory or hub id (`org/name`, `org/name@revision`); default: the demo model.
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Scheduler processes, of which one leads; more than one need a Redis: --store redis://HOST:PORT.
    #[arg(long, default_value_t = 1, value_parser = count())]
    schedulers: usize,
    /// Gateway processes: the first listens where --listen says, each other one on the port after that of the one before.
    #[arg(long, default_value_t = 1, value_parser = count(), conflicts_with = "separate")]
    gateways: usize,
    /// Node processes; default: stages × tp × replicas. More are standbys.
    #[arg(long, value_parser = count())]
    nodes: Option<usize>,
    /// Pipeline stages per replica; default: 2 for the demo model, else the fewest that fit.
    #[arg(long, value_parser = count())]
    stages: Option<usize>,
    /// Tensor-parallel ranks per stage: 1, 2, 4 or 8.
    #[arg(long, value_name = "N", value_parser = count())]
    tp: Option<usize>,
    /// Full copies of the model.
    #[arg(long, value_parser = count())]
    replicas: Option<usize>,
    #[command(flatten)]
    cache: CacheArgs,
    /// The directory below which `lora_path` of POST /v1/load_lora_adapter names adapters; default: adapters in the state
    /// directory.
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    #[command(flatten)]
    edge: EdgeArgs,
    /// Let other machines join: where they connect. Nodes and schedulers then listen beyond this machine, and all that they say
    /// is encrypted and mutual. Schedulers take the ports above this one.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "0.0.0.0:7400")]
    join_listen: Option<SocketAddr>,
    /// The host name or address under which other machines reach this one; default: its address on the way out.
    #[arg(long, value_name = "HOST", requires = "join_listen")]
    advertise: Option<String>,
    /// Run every role but the gateway on a network of its own (Linux, root), as if on a machine of its own, so that `ashlar drill` can
    /// cut it off. Clusters that run at once have different numbers; default: the first that is free.
    #[arg(
        long, value_name = "NUMBER", num_args = 0..=1, require_equals = true, conflicts_with = "join_listen",
        value_parser = clap::value_parser!(u8).range(1..255),
    )]
    separate: Option<Option<u8>>,
    /// Where state, logs and configurations are kept.
    #[arg(long, default_value = "./.ashlar", value_name = "DIR")]
    state: PathBuf,
    /// Longest sequence in tokens; default: what the model allows, at most 8192.
    #[arg(long, value_name = "TOKENS")]
    max_context: Option<u32>,
    /// Compute threads of each node; default: the machine's, shared out.
    #[arg(long, value_name = "N", value_parser = count())]
    threads: Option<usize>,
    /// Keep each compute thread on a core of its own, on different cores for each node.
    #[arg(long)]
    pin: bool,
    /// Memory of each node, for example 4GiB; default: nine tenths of what is available, shared out.
    #[arg(long, value_name = "SIZE", value_parser = crate::plan::parse_bytes)]
    memory: Option<Bytes>,
    /// Force an instruction set: avx512, avx512bw, avx2 or portable. The bits are the same.
    #[arg(long)]
    isa: Option<String>,
    /// Cluster state in Redis instead of the embedded store, for example redis://127.0.0.1:6379/0.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Where uploaded files, samples, checkpoints and adapters are kept: a directory, or s3://BUCKET/PREFIX; default: `blobs`
    /// in the state directory.
    #[arg(long, value_name = "ADDRESS")]
    blobs: Option<String>,
    /// Compute this share of the answers again on another replica and compare the bits, for example 0.1%.
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    audit: Option<f64>,
    /// Send traces there (OTLP over HTTP), for example http://127.0.0.1:4318.
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// More keys of the scheduler's configuration, `key=value` in TOML, for example max_num_seqs=16.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    scheduler_settings: Vec<String>,
    /// More keys of every node's configuration, `key=value` in TOML, for example links.shared_memory=false.
    #[arg(long = "set-node", value_name = "KEY=VALUE")]
    node_settings: Vec<String>,
    /// More keys of the gateway's configuration, `key=value` in TOML, for example deadline_ms=60000.
    #[arg(long = "set-gateway", value_name = "KEY=VALUE")]
    gateway_settings: Vec<String>,
}

/// How many of something: at least one, and no more than one machine could ever start.
fn count() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..=1024)
}

/// A share from 0 to 1, or in percent.
fn parse_share(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.strip_suffix('%') {
        Some(percent) => (percent, 0.01),
        None => (text, 1.0),
    };
    let share = number.trim().parse::<f64>().ok().map(|number| number * unit);
    share
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| format!("{text:?} is not a share: write 0.1% or 0.001, at most 100%"))
}

pub(crate) fn run(args: UpArgs) -> Result<()> {
    fs::create_dir_all(&args.state)
        .with_context(|| format!("cannot create the state directory {}", args.state.display()))?;
    let state = fs::canonicalize(&args.state)?;
    let _lock = lock(&state)?;
    // Ask for the port before anything is loaded: the commonest mistake should cost no time.
    // Kept from then on, or a node that takes any port may be given the gateway's before it listens.
    let ports = (0..args.gateways)
        .map(|number| gateway_port(args.edge.listen, number))
        .collect::<Result<Vec<_>>>()?;
    // Port 0 means any: whichever it is now, the gateway listens there.
    let listen: Vec<SocketAddr> = ports.iter().map(ReservedPort::address).collect();
    args.edge.check(&listen, &args.gateway_settings)?;
    let demo = args.model.is_none();
    let directory = match &args.model {
        None => demo::unpack(&state)?,
        Some(model) => {
            let found = hub::resolve(model, &mut |file| eprintln!("fetching {file} of {model}"))?;
            fs::canonicalize(&found)?
        }
    };
    let plan = Cluster::prepare(&args, &listen, &state, &directory, demo)?;
    roles::runtime()?.block_on(plan.run(&listen))
}

/// Where a gateway listens.
fn gateway_port(first: SocketAddr, number: usize) -> Result<ReservedPort> {
    let port = match first.port() {
        0 => Some(0),
        port => u16::try_from(number).ok().and_then(|number| port.checked_add(number)),
    };
    let port =
        port.with_context(|| format!("{first} has not as many ports above it as --gateways asks for"))?;
    let address = SocketAddr::new(first.ip(), port);
    ReservedPort::at(address)
        .with_context(|| format!("cannot listen on {address}: choose another address with --listen"))
}

/// Holds the state directory for this process.
fn lock(state: &Path) -> Result<File> {
    let file = File::create(state.join("up.lock"))?;
    if file.try_lock().is_err() {
        bail!(
            "the state directory {} is in use by another `ashlar up`: give this one --state DIR",
            state.display()
        );
    }
    Ok(file)
}

/// What will be started.
#[derive(Debug)]
struct Cluster {
    /// Where machines join, and what to run there.
    enrolment: Option<(Role, EnrolmentConfig)>,
    gateways: Vec<Role>,
    schedulers: Vec<Role>,
    nodes: Vec<Role>,
    model_name: String,
    edge: Edge,
    state: PathBuf,
    /// Where schedulers listen, for as long as the cluster lives.
    _ports: Vec<[ReservedPort; 2]>,
    _join_port: Option<ReservedPort>,
    /// Removed when the roles have ended.
    _network: Option<Network>,
}

fn scheduler_name(number: usize, schedulers: usize) -> String {
    if schedulers == 1 { "scheduler".to_owned() } else { format!("scheduler-{number}") }
}

fn gateway_name(number: usize, gateways: usize) -> String {
    if gateways == 1 { "gateway".to_owned() } else { format!("gateway-{number}") }
}

fn node_name(number: usize) -> String {
    format!("node-{number}")
}

impl Cluster {
    fn prepare(
        args: &UpArgs,
        listen_clients: &[SocketAddr],
        state: &Path,
        directory: &Path,
        demo: bool,
    ) -> Result<Cluster> {
        let model_name = args.model.clone().unwrap_or_else(|| "ashlar-demo".into());
        let served = Path::new(&model_name)
            .file_name()
            .filter(|_| Path::new(&model_name).exists())
            .map_or(model_name.clone(), |name| name.to_string_lossy().into_owned());
        let card = roles::model_card(&directory.to_string_lossy(), args.precision.precision(), None)?;
        let stages = args.stages.or(demo.then_some(2));
        let (tp, replicas) = (args.tp.unwrap_or(1), args.replicas.unwrap_or(1));
        let needed = stages.unwrap_or(1) * tp * replicas;
        let nodes = args.nodes.unwrap_or(needed);
        if nodes < needed && args.join_listen.is_none() {
            bail!(
                "--nodes {nodes} are too few for {needed} ranks (stages × tp × replicas); with --join-listen other machines \
                 can be the rest"
            );
        }
        if stages.is_some_and(|stages| stages > card.shape.num_layers) {
            bail!("the model has {} layers: --stages cannot be more", card.shape.num_layers);
        }
        let schedulers = args.schedulers;
        if schedulers > 1 && !args.store.as_deref().is_some_and(|store| store.starts_with("redis")) {
            bail!("--schedulers {schedulers} need a store that they share: --store redis://HOST:PORT");
        }
        let opening = args
            .join_listen
            .map(|listen| Opening::new(listen, args.advertise.as_deref(), state))
            .transpose()?;
        network::forget(state);
        let network = args
            .separate
            .map(|number| {
                let nodes = (0..nodes).map(node_name);
                let names = (0..schedulers).map(|number| scheduler_name(number, schedulers)).chain(nodes);
                let names: Vec<_> = ["gateway".to_owned()].into_iter().chain(names).collect();
                Network::create(state, number, &names)
            })
            .transpose()?;
        // On a network of its own every scheduler has the same ports, which nobody else wants.
        let here = if network.is_some() { 0 } else { schedulers };
        let ports: Vec<[ReservedPort; 2]> = (0..here)
            .map(|number| {
                let nodes = match &opening {
                    None => ReservedPort::any()?,
                    Some(opening) => opening.scheduler_port(number)?,
                };
                Ok([nodes, ReservedPort::any()?])
            })
            .collect::<Result<_>>()?;
        let listen: Vec<[SocketAddr; 2]> = match &network {
            None => ports.iter().map(|pair| pair.each_ref().map(ReservedPort::address)).collect(),
            Some(network) => (0..schedulers)
                .map(|number| network.scheduler(&scheduler_name(number, schedulers)))
                .collect::<Result<_>>()?,
        };
        let addresses = |of: usize| {
            let all = listen.iter().map(|pair| from_here(pair[of]).to_string()).collect();
            Addresses::new(all).context("at least one scheduler")
        };
        // Whoever listens beyond loopback says who it is.
        let own = network.as_ref().map(|_| Identities::open(state)).transpose()?;
        let identities = opening.as_ref().map(|opening| &opening.identities).or(own.as_ref());
        let identity =
            |role, name: &str| identities.map(|identities| identities.make(role, name)).transpose();
        let context = args.max_context.unwrap_or(DEFAULT_CONTEXT_MAX).min(card.max_context_tokens);
        let mut scheduler = SchedulerConfig::new(directory.to_string_lossy());
        scheduler.store =
            args.store.clone().unwrap_or_else(|| format!("redb:{}", state.join("cluster.redb").display()));
        scheduler.max_context_tokens = Some(context);
        scheduler.quantize = args.precision.quantize;
        scheduler.kv_cache_type = args.precision.kv_cache_type;
        scheduler.activation_type = args.precision.activation_type;
        scheduler.stages = stages;
        scheduler.tensor_parallel_size = args.tp;
        scheduler.replicas = args.replicas.or(args.nodes.is_none().then_some(1));
        scheduler.expected_nodes = Some(nodes.max(needed));
        scheduler.otlp_endpoint = args.otlp_endpoint.clone();
        scheduler.audit_share = args.audit.unwrap_or_default();
        let blobs = args.blobs.clone().unwrap_or_else(|| state.join("blobs").to_string_lossy().into_owned());
        scheduler.blobs = Some(blobs.clone());
        let adapters = args.adapters.clone().unwrap_or_else(|| state.join("adapters"));
        fs::create_dir_all(&adapters)
            .with_context(|| format!("cannot create the directory of adapters {}", adapters.display()))?;
        let enrolment = opening
            .as_ref()
            .map(|opening| {
                let config = opening.enrolment(&ports, directory, args.model.as_deref(), &card)?;
                let config =
                    EnrolmentConfig { blobs: Some(blobs.clone()).filter(|at| at.contains("://")), ..config };
                Ok::<_, anyhow::Error>((
                    Writer { state, network: None }.write("enrolment", "enrolment", &config)?,
                    config,
                ))
            })
            .transpose()?;
        let edge = Edge::open(&args.edge, listen_clients, state)?;
        let mut gateway = GatewayConfig {
            blobs: scheduler.blobs.clone(),
            adapters: Some(fs::canonicalize(&adapters)?),
            model: directory.to_string_lossy().into_owned(),
            scheduler: addresses(1)?,
            served_model_name: vec![served.clone()],
            otlp_endpoint: args.otlp_endpoint.clone(),
            ..GatewayConfig::default()
        };
        edge.configure(&mut scheduler, &mut gateway, state);
        let threads = args.threads.unwrap_or_else(|| (ashlar_kernels::available_threads() / nodes).max(1));
        let cores = if args.pin {
            cores_of_nodes(&ashlar_kernels::available_cores(), nodes, threads)?
        } else {
            Vec::new()
        };
        let available = memory::available_memory().unwrap_or(Bytes(1 << 30)).0 / 10 * 9;
        let memory = args.memory.map_or(available / nodes as u64, |bytes| bytes.0);
        let cache = args.cache.place()?;
        let roles = Writer { state, network: network.as_ref() };
        let nodes = (0..nodes)
            .map(|index| {
                let name = node_name(index);
                let anywhere = match &network {
                    None => opening.as_ref().map_or("127.0.0.1:0".into(), Opening::any_port),
                    Some(network) => SocketAddr::from((network.address(&name)?, 0)).to_string(),
                };
                let config = NodeConfig {
                    name: NodeId(name.clone()),
                    scheduler: addresses(0)?,
                    listen: anywhere,
                    advertise_host: opening.as_ref().map(|opening| opening.host.clone()),
                    identity: identity(IdentityRole::Node, &name)?,
                    allow_plaintext: false,
                    state: state.to_owned(),
                    model: None,
                    fetch: Default::default(),
                    models: None,
                    blobs: Some(blobs.clone()),
                    cache: cache.clone().map(CacheConfig::from),
                    memory_bytes: Some(memory),
                    threads: Some(threads),
                    pin: cores.get(index).map_or_else(Pin::default, |cores| Pin::Cores(cores.clone())),
                    isa: args.isa.clone(),
                    layers: None,
                    drain_grace_ms: NODE_GRACE_MS,
                    otlp_endpoint: args.otlp_endpoint.clone(),
                    links: Default::default(),
                    link_faults: Default::default(),
                    compute_faults: Default::default(),
                };
                let config = toml::Table::try_from(&config).context("a node's configuration")?;
                roles.write(&name, "node", &with_settings(config, &args.node_settings, "--set-node")?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Cluster {
            gateways: listen_clients
                .iter()
                .enumerate()
                .map(|(number, &listen)| {
                    let name = gateway_name(number, args.gateways);
                    let identity = identity(IdentityRole::Gateway, &name)?;
                    let config = GatewayConfig { identity, listen, ..gateway.clone() };
                    let config = toml::Table::try_from(&config).context("a gateway's configuration")?;
                    let settings = with_settings(config, &args.gateway_settings, "--set-gateway")?;
                    roles.write(&name, "gateway", &settings)
                })
                .collect::<Result<_>>()?,
            schedulers: listen
                .iter()
                .enumerate()
                .map(|(number, [nodes, gateways])| {
                    scheduler.listen_nodes = nodes.to_string();
                    scheduler.listen_gateways = gateways.to_string();
                    let name = scheduler_name(number, schedulers);
                    scheduler.identity = identity(IdentityRole::Scheduler, &name)?;
                    let config = toml::Table::try_from(&scheduler).context("a scheduler's configuration")?;
                    roles.write(
                        &name,
                        "scheduler",
                        &with_settings(config, &args.scheduler_settings, "--set")?,
                    )
                })
                .collect::<Result<_>>()?,
            nodes,
            model_name: served,
            edge,
            state: state.to_owned(),
            enrolment,
            _join_port: opening.map(|opening| opening.port),
            _ports: ports,
            _network: network,
        })
    }

    async fn run(self, listen: &[SocketAddr]) -> Result<()> {
        let shutdown = Shutdown::listen().context("cannot listen to signals")?;
        let (tell, mut notices) = mpsc::channel(64);
        let start = |role: &Role| Supervised::start(role.clone(), tell.clone());
        let schedulers: Vec<_> = self.schedulers.iter().map(start).collect();
        let nodes: Vec<_> = self.nodes.iter().map(start).collect();
        let enrolment = self.enrolment.as_ref().map(|(role, _)| start(role));
        let gateways: Vec<_> = self.gateways.iter().map(start).collect();
        if let Some((_, config)) = &self.enrolment {
            eprintln!("another machine may join, once, within an hour (`ashlar token create` lets more in):");
            eprintln!("  {}", enrolment::commands::first_token(config)?);
        }
        let bases: Vec<String> = listen.iter().map(|listen| self.edge.url(*listen)).collect();
        let (base, others) = bases.split_first().context("at least one gateway")?;
        let client = self.edge.client(base)?;
        self.edge.announce();
        let watching = self.watch(&client, (base, others), &mut notices);
        let result = tokio::select! {
            reason = shutdown.requested() => {
                eprintln!("\n{reason}: draining (again to stop at once)");
                Ok(())
            }
            failure = watching => failure,
        };
        // From the edge inwards: streams may still end while the cluster behind them is whole.
        let grace = if result.is_ok() { DRAIN_GRACE } else { EXIT_GRACE };
        let mut ending = tokio::task::JoinSet::new();
        gateways.into_iter().for_each(|gateway| drop(ending.spawn(gateway.end(grace))));
        ending.join_all().await;
        for role in schedulers.into_iter().chain(nodes).chain(enrolment) {
            role.end(EXIT_GRACE).await;
        }
        result
    }

    /// Shows progress until the cluster is ready, then reports what happens to it. Returns only on failure.
    async fn watch(
        &self,
        client: &Client,
        (base, others): (&str, &[String]),
        notices: &mut mpsc::Receiver<Notice>,
    ) -> Result<()> {
        let bar = ProgressBar::new(1000).with_style(
            ProgressStyle::with_template("{msg:36} {bar:40} {percent:>3} %").context("progress bar")?,
        );
        bar.set_message(format!("loading {}", self.model_name));
        let mut ready = false;
        let mut running = Processes::new();
        let mut problem = String::new();
        let mut poll = tokio::time::interval(POLL);
        loop {
            tokio::select! {
                notice = notices.recv() => match notice {
                    None => bail!("the supervisor stopped"),
                    Some(Notice::Started { name, pid }) => {
                        bar.suspend(|| eprintln!("{name:<10} pid {pid}"));
                        running.insert(name, pid);
                        self.tell_processes(&running);
                    }
                    Some(Notice::Ended { name, how }) => {
                        running.remove(&name);
                        self.tell_processes(&running);
                        bar.suspend(|| eprintln!("{name} ended ({how}): starting it again"));
                        ready = false;
                    }
                    Some(Notice::GaveUp { name, log_tail }) => {
                        bar.finish_and_clear();
                        bail!("{name} cannot run; the end of its log:\n{log_tail}");
                    }
                },
                _ = poll.tick(), if !ready => {
                    let ready_now = client.get("/ready").await.is_ok_and(|(status, _)| status == 200);
                    let Ok((_, state)) = client.get("/admin/cluster").await else { continue };
                    let cluster = &state["cluster"];
                    show_progress(&bar, cluster, &mut problem);
                    if ready_now {
                        ready = true;
                        bar.finish_and_clear();
                        self.announce(base, others, cluster);
                    }
                }
            }
        }
    }

    /// For other commands. The cluster runs on whether they can know it or not.
    fn tell_processes(&self, running: &Processes) {
        if let Err(error) = processes::write(&self.state, running) {
            eprintln!("warning: {error:#}");
        }
    }

    fn announce(&self, base: &str, others: &[String], cluster: &Value) {
        let model = &self.model_name;
        eprintln!("\n{model} is ready at {base}/v1");
        for other in others {
            eprintln!("  and at {other}/v1");
        }
        for node in cluster["nodes"].as_array().into_iter().flatten() {
            let name = node["node"].as_str().unwrap_or("?");
            let place = match node["place"].as_array() {
                Some(place) => format!(
                    "replica {} stage {} rank {} layers {}..{}",
                    place[0], place[1], place[2], node["layers"]["start"], node["layers"]["end"]
                ),
                None => "standby".into(),
            };
            eprintln!("  {name:<10} {place:<42} {}", Bytes(node["reserved"].as_u64().unwrap_or(0)));
        }
        let question = json!({"model": model, "messages": [{"role": "user", "content": "What is 12 + 34?"}]});
        let options = self.edge.curl_options();
        eprintln!(
            "\n  curl{options} {base}/v1/chat/completions -H 'content-type: application/json' -d '{question}'"
        );
        let here = if base.ends_with(":8080") { String::new() } else { format!(" --url {base}") };
        eprintln!("  {}ashlar chat{here}\n\nCtrl-C drains and stops.", self.edge.trust_prefix());
    }
}

/// `threads` cores for each of `nodes` nodes, no core twice.
fn cores_of_nodes(cores: &[usize], nodes: usize, threads: usize) -> Result<Vec<Vec<usize>>> {
    if nodes * threads > cores.len() {
        bail!(
            "--pin needs a core for each thread: {nodes} nodes × {threads} threads are more than the {} cores that \
             threads can be kept on here; lower --threads, or leave --pin out",
            cores.len()
        );
    }
    Ok(cores.chunks(threads).take(nodes).map(<[usize]>::to_vec).collect())
}

fn show_progress(bar: &ProgressBar, cluster: &Value, problem: &mut String) {
    let now = cluster["problem"].as_str().unwrap_or_default();
    if now != problem {
        if !now.is_empty() {
            bar.suspend(|| eprintln!("not ready: {now}"));
        }
        *problem = now.to_owned();
    }
    let shares: Vec<f64> = cluster["nodes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|node| !node["place"].is_null())
        .filter_map(|node| node["loaded"].as_f64())
        .collect();
    if !shares.is_empty() {
        bar.set_position((1000.0 * shares.iter().sum::<f64>() / shares.len() as f64) as u64);
    }
}

/// Writes roles' configurations below the state directory.
struct Writer<'a> {
    state: &'a Path,
    network: Option<&'a Network>,
}

impl Writer<'_> {
    fn write(&self, name: &str, command: &'static str, config: &impl Serialize) -> Result<Role> {
        let (configs, logs) = (self.state.join("config"), self.state.join("logs"));
        fs::create_dir_all(&configs)?;
        fs::create_dir_all(&logs)?;
        let path = configs.join(format!("{name}.toml"));
        let text = toml::to_string(config).with_context(|| format!("configuration of {name}"))?;
        // There may be keys in it.
        write_private(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        let log = logs.join(format!("{name}.log"));
        // Each run starts a fresh log, so that the end of it is about this run.
        File::create(&log)?;
        // Whoever holds no weights starts again at once, so that it may be killed on mere suspicion. But clients see a gateway go.
        let silence_max = match command {
            "scheduler" => Some(SCHEDULER_SILENCE_MAX),
            "gateway" => Some(GATEWAY_SILENCE_MAX),
            _ => None,
        };
        let network = self.network.and_then(|network| network.namespace(name));
        Ok(Role { name: name.to_owned(), command, config: path, log, silence_max, network })
    }
}

/// Writes a file that only its owner reads.
fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// A configuration with the keys that were given as `option key=value`.
fn with_settings(mut table: toml::Table, settings: &[String], option: &str) -> Result<toml::Table> {
    for setting in settings {
        let parsed: toml::Table = setting
            .parse()
            .with_context(|| format!("{option} {setting}: write key=value, strings in quotes"))?;
        merge(&mut table, parsed);
    }
    Ok(table)
}

/// Puts `settings` into `table`; a table within changes only the keys that it names.
fn merge(table: &mut toml::Table, settings: toml::Table) {
    for (key, value) in settings {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(settings)) => merge(inner, settings),
            (_, value) => drop(table.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pinned_nodes_get_different_cores_or_an_explanation() {
        let cores = cores_of_nodes(&[0, 1, 4, 5, 6], 2, 2).unwrap();
        assert_eq!(cores, [[0, 1], [4, 5]]);
        let error = cores_of_nodes(&[0, 1], 3, 1).unwrap_err();
        assert!(error.to_string().contains("lower --threads"), "{error}");
    }
}
