//! What ends a session from outside: every wait of its thread looks here, or is on something that this shuts.

use ashlar_identity::Socket;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Raised once. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Alarm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Why, once it is raised.
    reason: watch::Sender<Option<String>>,
    /// What the session's thread may be waiting on.
    sockets: Mutex<Vec<TcpStream>>,
}

/// It was raised, and this is why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended(pub(crate) String);

impl Alarm {
    pub(crate) fn new() -> Alarm {
        Alarm(Arc::new(Inner { reason: watch::channel(None).0, sockets: Mutex::default() }))
    }

    /// Raises it and shuts every connection of the session. The first reason stays.
    pub(crate) fn raise(&self, reason: &str) {
        self.0.reason.send_if_modified(|is| {
            let first = is.is_none();
            is.get_or_insert_with(|| reason.to_owned());
            first
        });
        for socket in self.sockets().drain(..) {
            shut(&socket);
        }
    }

    /// Whether it has been raised.
    pub(crate) fn check(&self) -> Result<(), Ended> {
        match &*self.0.reason.borrow() {
            None => Ok(()),
            Some(reason) => Err(Ended(reason.clone())),
        }
    }

    /// Shuts this connection too when it is raised.
    pub(crate) fn guard(&self, socket: &Socket) -> std::io::Result<()> {
        let handle = socket.tcp().try_clone()?;
        self.sockets().push(handle);
        // Raised in between, it may have missed this one.
        if self.check().is_err() {
            shut(socket.tcp());
        }
        Ok(())
    }

    /// Raises it if another rank has closed a connection, so that nobody goes on computing for the dead.
    pub(crate) fn probe(&self) -> Result<(), Ended> {
        self.check()?;
        let closed = self.sockets().iter().any(is_closed);
        if closed {
            self.raise("another rank of the session has closed its connection");
        }
        self.check()
    }

    /// Completes when it is raised.
    pub(crate) async fn raised(&self) -> Ended {
        let mut reason = self.0.reason.subscribe();
        let reason = reason.wait_for(Option::is_some).await;
        // The sender lives as long as this alarm.
        Ended(reason.ok().and_then(|reason| reason.clone()).unwrap_or_default())
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shut(socket: &TcpStream) {
    // A connection that is closed already is as shut as it can be.
    let _ = socket.shutdown(Shutdown::Both);
}

/// Whether the other side has closed, as far as that has arrived and nothing unread stands before it.
fn is_closed(socket: &TcpStream) -> bool {
    let mut byte = [0_u8; 1];
    match rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, length)) => length == 0,
        Err(error) => !matches!(error, Errno::AGAIN | Errno::INTR),
    }
}
