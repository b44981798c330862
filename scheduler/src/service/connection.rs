//! Sockets: a reader and a writer task per connection, and the queues between them and the owner of all state.

use crate::cluster::NodeConnection;
use crate::engine::GatewayId;
use ashlar_identity::stream::{ReadHalf, Stream, WriteHalf};
use ashlar_identity::{Identity, Role, Transport};
use ashlar_protocol::frame;
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::ToScheduler;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

/// An encoded message; one for all ranks of a replica.
pub(super) type Frame = Arc<[u8]>;

/// Messages that may wait for a peer that reads slowly; one more and its connection is closed.
const OUTBOX_FRAMES_MAX: usize = 4096;
/// Messages that may wait for the owner; a reader whose message does not fit waits.
pub(super) const INBOX_MESSAGES_MAX: usize = 1024;
/// Bytes that go out in one write where several messages wait.
const WRITE_BYTES: usize = 64 << 10;
/// Connections of one kind at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Connections of one kind that have not said yet who they are.
const STRANGERS_MAX: usize = 256;
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that takes nothing for this long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after the system refuses to accept (no file descriptor is free).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The sending side of a connection. Dropping it sends what waits, then closes.
#[derive(Debug)]
pub(super) struct Peer {
    outbox: mpsc::Sender<Frame>,
    reader: JoinHandle<()>,
    /// Ends once everything is sent or the peer is given up.
    writer: Option<JoinHandle<()>>,
}

impl Peer {
    /// Queues a message; `false` if the peer is gone or too slow.
    pub(super) fn send(&self, frame: Frame) -> bool {
        self.outbox.try_send(frame).is_ok()
    }

    /// Sends what waits, and closes; at most for as long as a write may take.
    pub(super) async fn close(mut self) {
        let writer = self.writer.take();
        drop(self);
        if let Some(writer) = writer {
            let _ = writer.await;
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// What a connection brings to the owner.
#[derive(Debug)]
pub(super) enum Arrival<Id, Message> {
    Opened(Id, Peer),
    Message(Id, Message),
    Closed(Id, String),
}

/// From nodes.
pub(super) type NodeArrival = Arrival<NodeConnection, FromNode>;
/// From gateways.
pub(super) type GatewayArrival = Arrival<GatewayId, ToScheduler>;

/// Names connections, each once in the life of the process.
#[derive(Debug, Default)]
pub(super) struct Numbers(AtomicU64);

impl Numbers {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Where peers of one role knock.
pub(super) struct Door {
    pub(super) listener: Arc<TcpListener>,
    pub(super) transport: Transport,
    /// Who is let in.
    pub(super) role: Role,
}

/// What only a peer of a certain name may say.
pub(super) trait Vetted {
    /// Why this peer may not say this, and a last word to it.
    fn refusal(&self, peer: &Identity) -> Option<(String, Frame)>;
}

impl Vetted for FromNode {
    fn refusal(&self, peer: &Identity) -> Option<(String, Frame)> {
        let FromNode::Join(join) = self else { return None };
        let reason = format!(
            "{peer} has joined as node {}: a node's `name` is the one that it has enrolled with",
            join.node
        );
        let last_word = || frame::encode(&ToNode::Rejected(reason.clone())).into();
        (join.node.0 != peer.name()).then(|| (reason.clone(), last_word()))
    }
}

impl Vetted for ToScheduler {
    fn refusal(&self, _: &Identity) -> Option<(String, Frame)> {
        None
    }
}

/// Accepts connections until the owner is gone.
pub(super) async fn accept<Id, Message>(
    door: Door,
    numbers: Arc<Numbers>,
    name: fn(u64) -> Id,
    arrivals: mpsc::Sender<Arrival<Id, Message>>,
) where
    Id: Copy + Send + 'static,
    Message: DeserializeOwned + Vetted + Send + 'static,
{
    let Door { listener, transport, role } = door;
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = arrivals.closed() => return,
        };
        let Ok((socket, address)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%address, "refused: {CONNECTIONS_MAX} connections are open");
            continue;
        };
        let Ok(stranger) = strangers.clone().try_acquire_owned() else {
            tracing::warn!(%address, "refused: {STRANGERS_MAX} connections have not said yet who they are");
            continue;
        };
        let id = name(numbers.next());
        let (arrivals, transport) = (arrivals.clone(), transport.clone());
        tokio::spawn(async move {
            let _place = place;
            let greeted = greet(socket, &transport, role).await;
            drop(stranger);
            match greeted {
                Ok(socket) => run(id, socket, arrivals).await,
                Err(error) if error.is_departure() => {
                    tracing::debug!(%address, "a connection ended before it said whose it is");
                }
                Err(error) => tracing::warn!(%address, %error, "refused a connection"),
            }
        });
    }
}

/// Closes every connection at once, for as long as it is polled.
pub(super) async fn turn_away(listener: &TcpListener) -> std::convert::Infallible {
    loop {
        if listener.accept().await.is_err() {
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

async fn greet(socket: TcpStream, transport: &Transport, role: Role) -> Result<Stream, frame::FrameError> {
    frame::tune(&socket)?;
    let greeting = async {
        let mut socket = transport.accept(socket, role).await?;
        frame::greet(&mut socket, "scheduler").await?;
        Ok(socket)
    };
    let greeted = tokio::time::timeout(GREETING_TIMEOUT, greeting).await;
    greeted.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
}

async fn run<Id, Message>(id: Id, socket: Stream, arrivals: mpsc::Sender<Arrival<Id, Message>>)
where
    Id: Copy + Send + 'static,
    Message: DeserializeOwned + Vetted + Send + 'static,
{
    let peer_identity = socket.peer().cloned();
    let (read, write) = socket.into_split();
    let (outbox, frames) = mpsc::channel(OUTBOX_FRAMES_MAX);
    let writer = tokio::spawn(write_frames(write, frames));
    let (start, started) = tokio::sync::oneshot::channel::<()>();
    let (inbox, last_words) = (arrivals.clone(), outbox.clone());
    let reader = tokio::spawn(async move {
        // The owner hears of the connection before it hears from it.
        if started.await.is_ok() {
            read_messages(id, read, inbox, (peer_identity, last_words)).await;
        }
    });
    let ended = reader.abort_handle();
    let peer = Peer { outbox, reader, writer: Some(writer) };
    if arrivals.send(Arrival::Opened(id, peer)).await.is_ok() {
        let _ = start.send(());
        // Holds the connection's place until its reader ends.
        while !ended.is_finished() {
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

async fn read_messages<Id: Copy, Message: DeserializeOwned + Vetted>(
    id: Id,
    socket: ReadHalf,
    arrivals: mpsc::Sender<Arrival<Id, Message>>,
    (peer, last_words): (Option<Identity>, mpsc::Sender<Frame>),
) {
    let mut socket = BufReader::new(socket);
    loop {
        let arrival = match frame::read(&mut socket).await {
            Ok(message) => match peer.as_ref().and_then(|peer| Message::refusal(&message, peer)) {
                None => Arrival::Message(id, message),
                Some((reason, last_word)) => {
                    tracing::warn!("refused: {reason}");
                    // Where there is no room for it, the connection just ends.
                    let _ = last_words.try_send(last_word);
                    Arrival::Closed(id, reason)
                }
            },
            Err(error) => Arrival::Closed(id, error.to_string()),
        };
        let last = matches!(arrival, Arrival::Closed(..));
        if arrivals.send(arrival).await.is_err() || last {
            return;
        }
    }
}

async fn write_frames(mut socket: WriteHalf, mut frames: mpsc::Receiver<Frame>) {
    let mut gathered = Vec::new();
    while let Some(first) = frames.recv().await {
        gathered.clear();
        gathered.extend_from_slice(&first);
        while gathered.len() < WRITE_BYTES
            && let Ok(next) = frames.try_recv()
        {
            gathered.extend_from_slice(&next);
        }
        let write = async {
            socket.write_all(&gathered).await?;
            socket.flush().await
        };
        let written = tokio::time::timeout(WRITE_TIMEOUT, write).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
    // The other side learns that this is the end, however long it goes on itself.
    let _ = tokio::time::timeout(WRITE_TIMEOUT, socket.shutdown()).await;
}
