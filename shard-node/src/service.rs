//! The thin shell of a node: what it owns, and its listener for other ranks.

use crate::config::NodeConfig;
use crate::control::{Leaving, Membership};
use crate::executor::{Command, Executor, Shared};
use crate::fence::Fence;
use crate::files::{FileServer, Shelf};
use crate::links::LinkSettings;
use crate::links::{self, LinkBreaker};
use crate::speeds;
use crate::threads::{self, ThreadsError};
use crate::training::{Resources, Sessions};
use ashlar_identity::{ListenError, Role, TlsError, Transport};
use ashlar_kernels::{Kernels, YieldFlag};
use ashlar_protocol::data::LinkPurpose;
use ashlar_protocol::frame::FrameError;
use ashlar_protocol::membership::{FromNode, Join};
use ashlar_service_kit::drain::CRASHED_VARIABLE;
use ashlar_service_kit::lock::{HeldFile, LockError};
use ashlar_service_kit::{Serving, ShutdownRequest, memory};
use ashlar_store::blobs::{self, BlobError, BlobOptions};
use ashlar_vocabulary::Bytes;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// Plans and links waiting for the compute thread; the scheduler keeps far fewer steps in flight.
const COMMAND_QUEUE: usize = 256;
/// Messages waiting for the control connection.
const OUTBOUND_QUEUE: usize = 256;
/// Data connections that have not said yet who they are, at a time; each has seconds to do so.
const STRANGERS_MAX: usize = 64;
/// When no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a node cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data port.
    #[error(
        "cannot listen on {address}: {source}; choose another port with `listen` in the node's configuration"
    )]
    Listen {
        /// The configured address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The fencing term.
    #[error("cannot use the state directory {path}: {source}")]
    State {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process is this node.
    #[error(
        "the state of node {node} is in use: {source}; stop that process, or give this one another `state` or `name`"
    )]
    InUse {
        /// The node.
        node: ashlar_vocabulary::NodeId,
        /// By whom.
        source: LockError,
    },
    /// Its identity cannot be used.
    #[error(transparent)]
    Identity(#[from] TlsError),
    /// It is somebody else's.
    #[error(
        "the identity in {directory} is that of {theirs}, this is node {node}: set `name`, or another `identity`"
    )]
    OtherIdentity {
        /// Where.
        directory: std::path::PathBuf,
        /// Whose it is.
        theirs: ashlar_identity::Identity,
        /// The configured name.
        node: ashlar_vocabulary::NodeId,
    },
    /// Anybody could take part.
    #[error(transparent)]
    Exposed(#[from] ListenError),
    /// The blob store.
    #[error("cannot use the blob store: {0}; `blobs` in the node's configuration says where it is")]
    Blobs(#[from] BlobError),
    /// The compute threads.
    #[error(transparent)]
    Threads(#[from] ThreadsError),
    /// The thread that computes has panicked: its log says why.
    #[error("the compute thread has panicked: the node ends, to be started again")]
    Crashed,
    /// The scheduler refused this node.
    #[error("the scheduler refused this node: {0}")]
    Rejected(String),
}

/// Runs a node until `shutdown` completes.
pub fn serve(config: NodeConfig, shutdown: impl Future<Output = ()> + Send + 'static) -> Serving<NodeError> {
    boxed(config, Box::pin(shutdown))
}

fn boxed(config: NodeConfig, shutdown: ShutdownRequest) -> Serving<NodeError> {
    Box::pin(serve_until(config, shutdown))
}

async fn serve_until(config: NodeConfig, shutdown: ShutdownRequest) -> Result<(), NodeError> {
    let _held = hold_state(&config)?;
    let transport = transport(&config)?;
    let kernels = Arc::new(threads::kernels(&config)?);
    let fence = Fence::open(config.state.join(format!("{}.fence.toml", config.name)))
        .map_err(|source| NodeError::State { path: config.state.clone(), source })?;
    let listener = TcpListener::bind(&config.listen)
        .map_err(|source| NodeError::Listen { address: config.listen.clone(), source })?;
    let bound = listener
        .local_addr()
        .map_err(|source| NodeError::Listen { address: config.listen.clone(), source })?;
    transport.check_listening(bound, config.allow_plaintext)?;
    let (commands, inbox) = std::sync::mpsc::sync_channel(COMMAND_QUEUE);
    let (out, mut outbound) = mpsc::channel(OUTBOUND_QUEUE);
    let (breaker, shared) = (LinkBreaker::default(), Shared::default());
    let blobs = match &config.blobs {
        Some(address) => Some(blobs::open(address, &BlobOptions::default()).await?),
        None => None,
    };
    let resources = Resources {
        blobs,
        runtime: tokio::runtime::Handle::current(),
        directory: config.state.join("training"),
        isa: kernels.isa(),
        threads: kernels.threads(),
        links: LinkSettings {
            faults: config.link_faults,
            shared_memory: config.links.shared_memory,
            // Spinning would take cores from serving.
            spin: Duration::ZERO,
        },
        transport: transport.clone(),
        urgent: YieldFlag::default(),
    };
    let sessions = Sessions::new(resources, out.clone());
    let shelf = Shelf::default();
    let inbound = InboundLinks {
        commands: commands.clone(),
        sessions: sessions.clone(),
        files: FileServer::new(shelf.clone()),
    };
    accept_links(listener, transport.clone(), inbound);
    let term = fence.term();
    let join = join_message(&config, &kernels, bound, term);
    let last_word = out.clone();
    let executor = Executor::new(
        config.clone(),
        kernels,
        commands.clone(),
        out,
        (breaker.clone(), transport.clone()),
        shared.clone(),
        fence,
        sessions.clone(),
        shelf,
    );
    let compute = std::thread::Builder::new()
        .name("compute".into())
        .spawn(move || {
            // Whoever computed beside it learns the reason before the process ends.
            if catch_unwind(AssertUnwindSafe(|| executor.run(&inbox))).is_err() {
                let _ = last_word.blocking_send(FromNode::Crashed);
            }
        })
        .map_err(|source| NodeError::State { path: config.state.clone(), source })?;
    let membership = Membership {
        config: &config,
        transport,
        join,
        commands: &commands,
        breaker: &breaker,
        shared: &shared,
        sessions: &sessions,
        crash_told: Default::default(),
        leaving: Leaving::default(),
    };
    let result = membership.keep_until(shutdown, &mut outbound).await;
    breaker.supersede();
    sessions.end_all("the node stops");
    drop(outbound);
    let _ = commands.send(Command::Shutdown);
    // Joined off the runtime: the thread may be in the middle of a layer.
    let ended = tokio::task::spawn_blocking(move || {
        sessions.leave("the node stops", &mut || ());
        compute.join()
    });
    let _ = ended.await;
    result
}

/// Two processes with one fence would each undo what the other one has promised.
fn hold_state(config: &NodeConfig) -> Result<HeldFile, NodeError> {
    std::fs::create_dir_all(&config.state)
        .map_err(|source| NodeError::State { path: config.state.clone(), source })?;
    HeldFile::hold(&config.state.join(format!("{}.lock", config.name)))
        .map_err(|source| NodeError::InUse { node: config.name.clone(), source })
}

/// How this node's connections are made, as itself.
fn transport(config: &NodeConfig) -> Result<Transport, NodeError> {
    let transport = Transport::open(config.identity.as_deref())?;
    match (transport.own(), &config.identity) {
        (Some(own), Some(directory)) if own.role() != Role::Node || own.name() != config.name.0 => {
            Err(NodeError::OtherIdentity {
                directory: directory.clone(),
                theirs: own.clone(),
                node: config.name.clone(),
            })
        }
        _ => Ok(transport),
    }
}

fn join_message(
    config: &NodeConfig,
    kernels: &Kernels,
    bound: SocketAddr,
    term: ashlar_vocabulary::LeaseTerm,
) -> Join {
    let host = config.advertise_host.clone().unwrap_or_else(|| bound.ip().to_string());
    let memory = config
        .memory_bytes
        .unwrap_or_else(|| memory::available_memory().map_or(1 << 30, |bytes| bytes.0 / 10 * 9));
    // More than the caches hold, and little beside what is offered.
    let working_set_bytes = (memory / 16).clamp(64 << 20, 256 << 20);
    let remembered = config.state.join(format!("{}.speeds.toml", config.name));
    let speeds = speeds::of_machine(kernels, working_set_bytes as usize, &remembered);
    Join {
        node: config.name.clone(),
        data_address: format!("{host}:{}", bound.port()),
        memory: Bytes(memory),
        bandwidth_bytes_per_s: speeds.bytes_per_s,
        flops_per_s: speeds.flops_per_s,
        quantized_flops_per_s: speeds.quantized_flops_per_s,
        threads: kernels.threads() as u32,
        isa: kernels.isa().to_string(),
        layers: config.layers,
        holds: None,
        term,
        leaving: false,
        crashed: std::env::var(CRASHED_VARIABLE).ok().and_then(|signal| signal.parse().ok()),
    }
}

/// A connection that has not said yet who it is; so many at a time.
struct Stranger(Arc<AtomicUsize>);

impl Stranger {
    fn admit(count: &Arc<AtomicUsize>) -> Option<Stranger> {
        let stranger = Stranger(count.clone());
        (count.fetch_add(1, Ordering::Relaxed) < STRANGERS_MAX).then_some(stranger)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where data connections go.
#[derive(Clone)]
struct InboundLinks {
    commands: SyncSender<Command>,
    sessions: Sessions,
    files: FileServer,
}

/// Accepts data connections for the life of the process; a bad greeting concerns only its connection.
fn accept_links(listener: TcpListener, transport: Transport, links: InboundLinks) {
    let strangers = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let Ok(socket) = socket else {
                // Out of file descriptors, most likely: give others time to close some.
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            };
            let Some(stranger) = Stranger::admit(&strangers) else {
                warn!("refused a data connection: {STRANGERS_MAX} others have not said yet who they are");
                continue;
            };
            let (links, transport) = (links.clone(), transport.clone());
            std::thread::spawn(move || match accepted(socket, &transport, stranger) {
                Ok(inbound) => match inbound.hello.purpose {
                    LinkPurpose::Training { session, link } => {
                        links.sessions.arrived(session, link, inbound.socket)
                    }
                    LinkPurpose::Files => links.files.serve(inbound.socket),
                    LinkPurpose::Activations | LinkPurpose::Group { .. } | LinkPurpose::Head { .. } => {
                        let _ = links.commands.send(Command::Link(inbound));
                    }
                },
                Err(error) if error.is_departure() => {
                    debug!("a data connection ended before it said whose it is");
                }
                Err(error) => warn!("refused a data connection: {error}"),
            });
        }
    });
}

fn accepted(
    socket: std::net::TcpStream,
    transport: &Transport,
    _stranger: Stranger,
) -> Result<links::Inbound, FrameError> {
    links::accept(socket, transport)
}
