//! The thin shell: listens for other ranks, keeps the connection to the scheduler.

use crate::config::NodeConfig;
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
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::{FromNode, Join, ToNode};
use ashlar_service_kit::drain::CRASHED_VARIABLE;
use ashlar_service_kit::lock::{HeldFile, LockError};
use ashlar_service_kit::memory;
use ashlar_store::blobs::{self, BlobError, BlobOptions};
use ashlar_vocabulary::Bytes;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tracing::{info, warn};

/// Plans and links waiting for the compute thread; the scheduler keeps far fewer steps in flight.
const COMMAND_QUEUE: usize = 256;
/// Messages waiting for the control connection.
const OUTBOUND_QUEUE: usize = 256;
/// How long connecting to the scheduler may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// Data connections that have not said yet who they are, at a time; each has seconds to do so.
const STRANGERS_MAX: usize = 64;
/// A scheduler that says nothing for so long is left for another one, …
const SILENCE: Duration = Duration::from_secs(1);
/// … looked at so many times in between.
const SILENT_LOOKS: u32 = 5;
/// Where there is no other one, only its host's death is worth noticing: so many times as much.
const ALONE_FACTOR: u32 = 5;
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_millis(200);

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
pub async fn serve(config: NodeConfig, shutdown: impl Future<Output = ()>) -> Result<(), NodeError> {
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
    let session = Session {
        config: &config,
        transport,
        join,
        commands: &commands,
        breaker: &breaker,
        shared: &shared,
        sessions: &sessions,
        crash_told: AtomicBool::new(false),
        leaving: Leaving::default(),
    };
    let result = session.keep_until(shutdown, &mut outbound).await;
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
                std::thread::sleep(RECONNECT_MIN);
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

/// Why this node is to hold nothing any more.
#[derive(Debug, Default)]
struct Leaving {
    /// The process was asked to end.
    ending: AtomicBool,
    /// An operator wants it empty.
    drained: AtomicBool,
    /// Wakes whoever is to tell the scheduler.
    news: Notify,
}

impl Leaving {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    fn is_leaving(&self) -> bool {
        self.is_ending() || self.drained.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.news.notify_one();
    }
}

struct Session<'a> {
    config: &'a NodeConfig,
    transport: Transport,
    join: Join,
    commands: &'a SyncSender<Command>,
    breaker: &'a LinkBreaker,
    shared: &'a Shared,
    sessions: &'a Sessions,
    /// Whether a scheduler has been told that the process before this one crashed.
    crash_told: AtomicBool,
    leaving: Leaving,
}

impl Session<'_> {
    /// Takes part until `shutdown` completes, and then until others have taken this node's place, or for as long as they are
    /// given.
    async fn keep_until(
        &self,
        shutdown: impl Future<Output = ()>,
        outbound: &mut mpsc::Receiver<FromNode>,
    ) -> Result<(), NodeError> {
        let keeping = self.keep(outbound);
        tokio::pin!(keeping, shutdown);
        tokio::select! {
            result = &mut keeping => return result,
            () = &mut shutdown => self.leaving.end(),
        }
        let grace = Duration::from_millis(self.config.drain_grace_ms);
        info!("leaving: waiting up to {} s until others have taken this node's place", grace.as_secs());
        let Ok(result) = tokio::time::timeout(grace, keeping).await else {
            warn!("nobody has taken this node's place in time: it goes nevertheless");
            return Ok(());
        };
        result
    }

    /// Keeps a connection to the scheduler; returns when that refuses this node for good, or when this node has been asked to
    /// end and nobody needs it.
    async fn keep(&self, outbound: &mut mpsc::Receiver<FromNode>) -> Result<(), NodeError> {
        let mut pause = RECONNECT_MIN;
        for attempt in 0_usize.. {
            let address = self.config.scheduler.of_attempt(attempt);
            match self.connect_and_serve(address, outbound, &mut pause).await {
                Ok(last) => return last.map_or(Ok(()), Err),
                Err(_) if self.leaving.is_ending() => return Ok(()),
                Err(error) => warn!("scheduler {address}: {error}; reconnecting"),
            }
            self.breaker.supersede();
            self.sessions.end_all("the scheduler was lost");
            let _ = self.commands.try_send(Command::Release { for_now: true });
            // What the compute thread says without a scheduler is of no use; drain it so that it never blocks.
            let deadline = tokio::time::sleep(pause);
            tokio::pin!(deadline);
            loop {
                tokio::select! {
                    () = &mut deadline => break,
                    () = self.leaving.news.notified() => if self.leaving.is_ending() {
                        return Ok(());
                    },
                    message = outbound.recv() => if let Some(FromNode::Crashed) = message {
                        return Err(NodeError::Crashed);
                    },
                }
            }
            // Only when none of them leads is there a reason to wait longer.
            if (attempt + 1).is_multiple_of(self.config.scheduler.count()) {
                pause = (pause * 2).min(RECONNECT_MAX);
            }
        }
        unreachable!("attempts do not end")
    }

    async fn connect_and_serve(
        &self,
        address: &str,
        outbound: &mut mpsc::Receiver<FromNode>,
        pause: &mut Duration,
    ) -> Result<Option<NodeError>, FrameError> {
        // A scheduler that stands by accepts the connection but does not greet: try again rather than wait for ever.
        let speaker = format!("node {}", self.config.name);
        let greeting = async {
            let socket = TcpStream::connect(address).await?;
            frame::tune(&socket)?;
            let mut socket = self.transport.connect(socket, Role::Scheduler).await?;
            frame::greet(&mut socket, &speaker).await?;
            Ok::<_, FrameError>(socket)
        };
        let greeted = tokio::time::timeout(GREETING_TIMEOUT, greeting).await;
        let mut socket = greeted.map_err(|_| FrameError::Io(std::io::ErrorKind::TimedOut.into()))??;
        let leaving = self.leaving.is_leaving();
        let mut join = Join { holds: self.shared.held(), leaving, ..self.join.clone() };
        if self.crash_told.load(Ordering::Relaxed) {
            join.crashed = None;
        }
        frame::write(&mut socket, &FromNode::Join(Box::new(join))).await?;
        self.crash_told.store(true, Ordering::Relaxed);
        info!(scheduler = %address, "joined");
        *pause = RECONNECT_MIN;
        let (mut reader, mut writer) = socket.into_split();
        // Reading is not cancellation-safe, so it has a task of its own.
        let (deliver, mut arrived) = mpsc::channel::<Result<ToNode, FrameError>>(64);
        let reading = tokio::spawn(async move {
            loop {
                let message = frame::read(&mut reader).await;
                let ended = message.is_err();
                if deliver.send(message).await.is_err() || ended {
                    return;
                }
            }
        });
        // Counted, so that a node that stood still itself does not hold that against the scheduler.
        let mut looks = tokio::time::interval(SILENCE / SILENT_LOOKS);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let silent_looks_max =
            if self.config.scheduler.count() > 1 { SILENT_LOOKS } else { ALONE_FACTOR * SILENT_LOOKS };
        let mut silent_looks = 0;
        let ended = loop {
            tokio::select! {
                _ = looks.tick() => {
                    silent_looks += 1;
                    if silent_looks > silent_looks_max && arrived.is_empty() {
                        break Err(FrameError::Io(std::io::ErrorKind::TimedOut.into()));
                    }
                }
                message = arrived.recv() => {
                    silent_looks = 0;
                    if let Some(ended) = self.heed(message.unwrap_or(Err(FrameError::Closed))) {
                        break ended;
                    }
                }
                () = self.leaving.news.notified() => {
                    let leaving = FromNode::Leaving(self.leaving.is_leaving());
                    if let Err(error) = frame::write(&mut writer, &leaving).await {
                        break Err(error);
                    }
                }
                Some(message) = outbound.recv() => {
                    if let Err(error) = frame::write(&mut writer, &message).await {
                        break Err(error);
                    }
                    if message == FromNode::Crashed {
                        break Ok(Some(NodeError::Crashed));
                    }
                }
            }
        };
        reading.abort();
        ended
    }

    /// Does what the scheduler says; how the connection ended, if that was its end.
    fn heed(&self, message: Result<ToNode, FrameError>) -> Option<Result<Option<NodeError>, FrameError>> {
        match message {
            Err(error) => return Some(Err(error)),
            Ok(ToNode::Closing(reason)) => return Some(Err(FrameError::Refused(reason))),
            Ok(ToNode::Rejected(reason)) => return Some(Ok(Some(NodeError::Rejected(reason)))),
            Ok(ToNode::Dismissed) if self.leaving.is_ending() => return Some(Ok(None)),
            Ok(ToNode::Dismissed) => info!("this node is drained: it holds nothing"),
            Ok(ToNode::Drain(drained)) => {
                self.leaving.drained.store(drained, Ordering::Relaxed);
                self.leaving.news.notify_one();
            }
            Ok(message) => {
                if !self.dispatch(message) {
                    return Some(Err(FrameError::Io(std::io::ErrorKind::ResourceBusy.into())));
                }
            }
        }
        None
    }

    /// Hands a message to the compute thread; `false` if its queue is full, which an honest scheduler never causes.
    fn dispatch(&self, message: ToNode) -> bool {
        let command = match message {
            ToNode::Assign(assignment) => {
                let wish = self.breaker.supersede();
                self.sessions.end_all("the layout has changed");
                Command::Assign(assignment, wish)
            }
            ToNode::Release { .. } => {
                self.breaker.supersede();
                self.sessions.end_all("the layout was given up");
                Command::Release { for_now: false }
            }
            ToNode::Step(plan) => Command::Step(plan),
            ToNode::Prepare(assignment) => Command::Prepare(assignment),
            ToNode::OpenSession(open) => {
                self.sessions.open(*open);
                return true;
            }
            ToNode::Training { session, work } => {
                self.sessions.work(session, work);
                return true;
            }
            ToNode::LoadAdapter { revision, adapter, load } => {
                Command::LoadAdapter { revision, adapter, load }
            }
            ToNode::UnloadAdapter { adapter } => Command::UnloadAdapter(adapter),
            ToNode::Beat
            | ToNode::Closing(_)
            | ToNode::Rejected(_)
            | ToNode::Dismissed
            | ToNode::Drain(_) => return true,
        };
        self.commands.try_send(command).is_ok()
    }
}
