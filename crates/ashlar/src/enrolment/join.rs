//! `ashlar node --join`: a machine becomes a node of a cluster, once, and runs as that node from then on.
//!
//! The state directory keeps the identity (`identity/`: key, certificate, the authority's certificate) and where the cluster is
//! (`cluster.json`), which it asks the endpoint for anew at each start, as far as that answers. The key is durable before it is sent, so that an enrolment whose answer was lost can be repeated. Nothing is sent
//! before the endpoint has shown that it belongs to the cluster that the token is for.

use super::{as_host, own_address_towards};
use crate::demo;
use crate::plan::parse_bytes;
use crate::roles::permanent;
use anyhow::{Context, Result, anyhow, bail};
use ashlar_identity::token::SECRET_BYTES;
use ashlar_identity::{
    CertificateRequest, Credentials, Fingerprint, Identity, KeyPair, Role, TlsError, Token, name, transport,
};
use ashlar_model::{digest, hub};
use ashlar_protocol::enrolment::{
    ClusterFacts, ENROLMENT_BYTES_MAX, EnrolmentAnswer, EnrolmentRequest, ModelSource, Welcome,
};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_service_kit::Addresses;
use ashlar_service_kit::lock::{HeldFile, LockError};
use ashlar_shard_node::NodeConfig;
use ashlar_shard_node::config::{FetchPolicy, Pin};
use ashlar_vocabulary::{Bytes, NodeId};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How long nobody may listen there yet.
const REFUSED_MAX: Duration = Duration::from_secs(5);
/// From a connection to the answer.
const LIMIT: Duration = Duration::from_secs(15);
/// The same, for a node that knows the cluster already.
const LIMIT_OF_NEWS: Duration = Duration::from_secs(3);
const CLUSTER_FILE: &str = "cluster.json";
const IDENTITY: &str = "identity";
const LOCK: &str = "node.lock";

/// What `ashlar node` is told without a configuration file.
#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// The cluster to join: where `ashlar up --join-listen` listens. Needed once.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
    join: Option<String>,
    /// What lets this machine in, from `ashlar up` or `ashlar token create`. Needed once.
    #[arg(long, env = "ASHLAR_TOKEN", hide_env_values = true, conflicts_with = "config")]
    token: Option<String>,
    /// This node's name, unique in the cluster; default: the machine's.
    #[arg(long, conflicts_with = "config")]
    name: Option<String>,
    /// Where this node keeps its identity and its state.
    #[arg(long, default_value = "./.ashlar-node", value_name = "DIR", conflicts_with = "config")]
    state: PathBuf,
    /// The cluster's model on this machine: a directory, a GGUF file or a hub id; default: as the cluster names it. Where it is not on
    /// this machine, the node fetches what it needs.
    #[arg(long, value_name = "DIR|HUB_ID", conflicts_with = "config")]
    model: Option<String>,
    /// Fetch what this node needs of the model even if it is on this machine.
    #[arg(long, conflicts_with_all = ["config", "model"])]
    fetch: bool,
    /// Memory to offer, for example 8GiB; default: nine tenths of what is available.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, conflicts_with = "config")]
    memory: Option<Bytes>,
    /// Compute threads; default: all.
    #[arg(long, value_name = "N", conflicts_with = "config")]
    threads: Option<usize>,
    /// Where to listen for other nodes; port 0 picks a free one.
    #[arg(long, default_value = "0.0.0.0:0", value_name = "ADDR", conflicts_with = "config")]
    listen: String,
    /// The host name or address under which other nodes reach this one; default: its address on the way to the cluster.
    #[arg(long, value_name = "HOST", conflicts_with = "config")]
    advertise: Option<String>,
}

impl JoinArgs {
    /// Whether it was said that this machine shall join.
    pub(crate) fn is_given(&self) -> bool {
        self.join.is_some()
    }
}

/// A node that has enrolled, ready to run. Holds the state directory.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) config: NodeConfig,
    pub(crate) _held: HeldFile,
}

/// Enrols, unless that has been done, and says how to run.
pub(crate) async fn prepare(args: &JoinArgs) -> Result<Enrolled> {
    permanent(async { prepare_once(args).await }.await)
}

async fn prepare_once(args: &JoinArgs) -> Result<Enrolled> {
    let state = &args.state;
    fs::create_dir_all(state)
        .with_context(|| format!("cannot create the state directory {}", state.display()))?;
    let state = fs::canonicalize(state)?;
    let held = HeldFile::hold(&state.join(LOCK)).map_err(|error| match error {
        LockError::Held { pid, .. } => anyhow!(
            "the state directory {} is in use by another node (process {}): stop that one, or give this one --state DIR",
            state.display(),
            pid.map_or("unknown".into(), |pid| pid.to_string())
        ),
        error => error.into(),
    })?;
    let directory = state.join(IDENTITY);
    let token = args.token.as_deref().map(str::parse::<Token>).transpose()?;
    let (credentials, facts) = if Credentials::exist(&directory) && state.join(CLUSTER_FILE).is_file() {
        let credentials = Credentials::open(&directory)?;
        if let Some(token) = token.filter(|token| token.cluster() != credentials.fingerprint()) {
            bail!(
                "{} is of a node of cluster {}, the token is for cluster {}: give --state DIR with another directory",
                state.display(),
                credentials.fingerprint(),
                token.cluster()
            );
        }
        refresh(args, &state, credentials).await?
    } else {
        enrol(args, &state, token).await?
    };
    let identity = credentials.identity().context("the certificate names nobody")?;
    if let Some(name) = args.name.as_deref().filter(|name| *name != identity.name()) {
        bail!(
            "{} is of node {}: leave --name {name} out, or give --state DIR with another directory",
            state.display(),
            identity.name()
        );
    }
    eprintln!("{identity} of cluster {}", credentials.fingerprint());
    Ok(Enrolled { config: configuration(args, &state, &identity, &facts)?, _held: held })
}

/// What a node remembers of its cluster.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    /// Where it has joined.
    join: String,
    cluster: ClusterFacts,
}

fn known(state: &Path) -> Result<Known> {
    let path = state.join(CLUSTER_FILE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged: remove {} and join anew", path.display(), state.display()))
}

/// A node that has enrolled asks where the cluster is now. What it remembers has to do where nobody answers.
async fn refresh(
    args: &JoinArgs,
    state: &Path,
    credentials: Credentials,
) -> Result<(Credentials, ClusterFacts)> {
    let known = known(state)?;
    let address = args.join.clone().unwrap_or(known.join);
    let cluster = credentials.fingerprint();
    let identity = credentials.identity().context("the certificate names nobody")?;
    let key = KeyPair::keep_in(&state.join(IDENTITY))?;
    let request = CertificateRequest::sign(identity.name(), &key, cluster)?;
    let news = tokio::time::timeout(LIMIT_OF_NEWS, ask(&address, cluster, None, request)).await;
    let reason = match news {
        Ok(Ok(EnrolmentAnswer::Welcome(welcome))) => {
            return keep(state, address, &identity, cluster, &key, *welcome);
        }
        Ok(Ok(EnrolmentAnswer::Refused(reason))) => {
            bail!("{address} does not know this node any more: {reason}")
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", LIMIT_OF_NEWS.as_secs()),
    };
    eprintln!("no news of the cluster from {address} ({reason}): going on with what this node remembers");
    Ok((credentials, known.cluster))
}

/// Keeps what the endpoint has sent, if it is for this machine.
fn keep(
    state: &Path,
    join: String,
    identity: &Identity,
    expected: Fingerprint,
    key: &KeyPair,
    welcome: Welcome,
) -> Result<(Credentials, ClusterFacts)> {
    let Welcome { authority, certificate, cluster } = welcome;
    let credentials = Credentials::new(authority, certificate, key.pkcs8());
    if credentials.fingerprint() != expected || credentials.identity().as_ref() != Some(identity) {
        bail!("{join} has made a certificate for somebody else");
    }
    let known = Known { join, cluster };
    // With the certificate, which is written last, this machine has enrolled.
    write_durably(&state.join(CLUSTER_FILE), &serde_json::to_vec_pretty(&known)?)?;
    credentials.save(&state.join(IDENTITY))?;
    Ok((credentials, known.cluster))
}

async fn enrol(args: &JoinArgs, state: &Path, token: Option<Token>) -> Result<(Credentials, ClusterFacts)> {
    let (Some(address), Some(token)) = (&args.join, token) else {
        bail!(
            "{} is not of any cluster yet: run what `ashlar token create` prints on the cluster's first machine \
             (ashlar node --join HOST:PORT --token TOKEN)",
            state.display()
        );
    };
    let name = args
        .name
        .clone()
        .or_else(name::of_machine)
        .context("this machine has no name: choose one with --name")?;
    let identity = Identity::new(Role::Node, &name)?;
    let key = KeyPair::keep_in(&state.join(IDENTITY))?;
    let request = CertificateRequest::sign(&name, &key, token.cluster())?;
    let asking = ask(address, token.cluster(), Some(*token.secret()), request);
    let answer = tokio::time::timeout(LIMIT, asking)
        .await
        .map_err(|_| anyhow!("no answer within {} s", LIMIT.as_secs()))
        .and_then(|answer| answer.map_err(|error| explain(error, &token)))
        .with_context(|| format!("cannot join at {address}"))?;
    let welcome = match answer {
        EnrolmentAnswer::Welcome(welcome) => *welcome,
        EnrolmentAnswer::Refused(reason) => bail!("{address} does not let this machine join: {reason}"),
    };
    let (credentials, cluster) = keep(state, address.clone(), &identity, token.cluster(), &key, welcome)?;
    eprintln!("joined the cluster at {address} as {name}");
    check_model(args, state, &cluster)?;
    Ok((credentials, cluster))
}

async fn ask(
    address: &str,
    cluster: Fingerprint,
    secret: Option<[u8; SECRET_BYTES]>,
    request: CertificateRequest,
) -> Result<EnrolmentAnswer, FrameError> {
    // Whoever is given a token by a cluster that is just being started may be faster than that.
    let patience = if secret.is_some() { REFUSED_MAX } else { Duration::ZERO };
    let socket = reach(address, patience).await?;
    frame::tune(&socket)?;
    let mut stream = transport::connect_to_enrol(socket, cluster).await?;
    frame::greet(&mut stream, "node that joins").await?;
    frame::write(&mut stream, &EnrolmentRequest { secret, request }).await?;
    frame::read_within(&mut stream, ENROLMENT_BYTES_MAX).await
}

/// What is wrong with an endpoint, in terms of the token.
/// Connects, for as long as it takes until somebody listens there.
async fn reach(address: &str, patience: Duration) -> io::Result<TcpStream> {
    let asked = Instant::now();
    loop {
        match TcpStream::connect(address).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && asked.elapsed() < patience => {
                tokio::time::sleep(REFUSED_MAX / 25).await;
            }
            outcome => return outcome,
        }
    }
}

fn explain(error: FrameError, token: &Token) -> anyhow::Error {
    match error {
        FrameError::Tls(TlsError::Stranger) => anyhow!(
            "the token is for cluster {}, but another cluster answers there: take HOST:PORT and the token from the same line (the \
             token was not sent)",
            token.cluster()
        ),
        FrameError::Tls(TlsError::NotTls) => anyhow!(
            "what answers there is no enrolment endpoint: take HOST:PORT from the line that `ashlar token create` prints (the token \
             was not sent)"
        ),
        error => error.into(),
    }
}

/// Refuses another model before the cluster does. One that is not on this machine is checked when it is fetched.
fn check_model(args: &JoinArgs, state: &Path, facts: &ClusterFacts) -> Result<()> {
    let Some(model) = own_model(args, state, facts)? else { return Ok(()) };
    let Some(directory) = hub::local(&model) else {
        if hub::is_id(&model) {
            return Ok(());
        }
        bail!(
            "{model} is no model: give --model with a copy of the cluster's, or leave it out, and it is fetched"
        );
    };
    let digest = digest::model_digest(&directory, facts.precision)?;
    if digest != facts.model_digest {
        bail!(
            "{model} is another model than the cluster serves (its digest is {digest}, the cluster's {}): give --model with a copy \
             of the cluster's",
            facts.model_digest
        );
    }
    Ok(())
}

/// Where this machine has the cluster's model, unless it is where the cluster names it, or nowhere.
fn own_model(args: &JoinArgs, state: &Path, facts: &ClusterFacts) -> Result<Option<String>> {
    Ok(match (&args.model, &facts.model) {
        (Some(model), _) => Some(match Path::new(model).exists() {
            true => fs::canonicalize(model)?.to_string_lossy().into_owned(),
            false => model.clone(),
        }),
        (None, _) if args.fetch => None,
        (None, ModelSource::Demo) => Some(demo::unpack(state)?.to_string_lossy().into_owned()),
        (None, ModelSource::Hub(id)) => Some(id.clone()),
        (None, ModelSource::Directory(_)) => None,
    })
}

fn configuration(
    args: &JoinArgs,
    state: &Path,
    identity: &Identity,
    facts: &ClusterFacts,
) -> Result<NodeConfig> {
    let scheduler = Addresses::new(facts.schedulers.clone()).context("the cluster has named no scheduler")?;
    let host = match &args.advertise {
        Some(host) => host.clone(),
        None => {
            let towards = scheduler.of_attempt(0);
            let own = own_address_towards(towards).with_context(|| {
                format!("cannot tell this machine's address on the way to {towards}: give --advertise")
            })?;
            as_host(own)
        }
    };
    Ok(NodeConfig {
        name: NodeId(identity.name().to_owned()),
        scheduler,
        listen: args.listen.clone(),
        advertise_host: Some(host),
        identity: Some(state.join(IDENTITY)),
        allow_plaintext: false,
        state: state.to_owned(),
        model: own_model(args, state, facts)?,
        fetch: if args.fetch { FetchPolicy::Always } else { FetchPolicy::Missing },
        models: None,
        blobs: facts.blobs.clone(),
        cache: None,
        memory_bytes: args.memory.map(|memory| memory.0),
        threads: args.threads,
        pin: Pin::default(),
        isa: None,
        layers: None,
        drain_grace_ms: 10_000,
        otlp_endpoint: None,
        links: Default::default(),
        link_faults: Default::default(),
        compute_faults: Default::default(),
    })
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, bytes)?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
