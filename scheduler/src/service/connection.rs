//! Sockets: a reader and a writer task per connection, and the queues between them and the owner of all state.

use crate::cluster::NodeConnection;
use crate::engine::GatewayId;
use ashlar_protocol::frame;
use ashlar_protocol::membership::FromNode;
use ashlar_protocol::serving::ToScheduler;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
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

/// Accepts connections until the owner is gone.
pub(super) async fn accept<Id, Message>(
    listener: Arc<TcpListener>,
    numbers: Arc<Numbers>,
    name: fn(u64) -> Id,
    arrivals: mpsc::Sender<Arrival<Id, Message>>,
) where
    Id: Copy + Send + 'static,
    Message: DeserializeOwned + Send + 'static,
{
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
        let id = name(numbers.next());
        let arrivals = arrivals.clone();
        tokio::spawn(async move {
            let _place = place;
            match greet(socket).await {
                Ok(socket) => run(id, socket, arrivals).await,
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

async fn greet(mut socket: TcpStream) -> Result<TcpStream, frame::FrameError> {
    frame::tune(&socket)?;
    let greeting = tokio::time::timeout(GREETING_TIMEOUT, frame::greet(&mut socket, "scheduler")).await;
    greeting.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))?;
    Ok(socket)
}

async fn run<Id, Message>(id: Id, socket: TcpStream, arrivals: mpsc::Sender<Arrival<Id, Message>>)
where
    Id: Copy + Send + 'static,
    Message: DeserializeOwned + Send + 'static,
{
    let (read, write) = socket.into_split();
    let (outbox, frames) = mpsc::channel(OUTBOX_FRAMES_MAX);
    let writer = tokio::spawn(write_frames(write, frames));
    let (start, started) = tokio::sync::oneshot::channel::<()>();
    let inbox = arrivals.clone();
    let reader = tokio::spawn(async move {
        // The owner hears of the connection before it hears from it.
        if started.await.is_ok() {
            read_messages(id, read, inbox).await;
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

async fn read_messages<Id: Copy, Message: DeserializeOwned>(
    id: Id,
    socket: OwnedReadHalf,
    arrivals: mpsc::Sender<Arrival<Id, Message>>,
) {
    let mut socket = BufReader::new(socket);
    loop {
        let arrival = match frame::read(&mut socket).await {
            Ok(message) => Arrival::Message(id, message),
            Err(error) => Arrival::Closed(id, error.to_string()),
        };
        let last = matches!(arrival, Arrival::Closed(..));
        if arrivals.send(arrival).await.is_err() || last {
            return;
        }
    }
}

async fn write_frames(mut socket: OwnedWriteHalf, mut frames: mpsc::Receiver<Frame>) {
    let mut gathered = Vec::new();
    while let Some(first) = frames.recv().await {
        gathered.clear();
        gathered.extend_from_slice(&first);
        while gathered.len() < WRITE_BYTES
            && let Ok(next) = frames.try_recv()
        {
            gathered.extend_from_slice(&next);
        }
        let written = tokio::time::timeout(WRITE_TIMEOUT, socket.write_all(&gathered)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}
