//! Blocking connections, for data between nodes: plain, or encrypted.

use crate::name::Identity;
use crate::records::Records;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// A blocking connection. Handles that were cloned are the same connection: one thread may read while another writes, as on a
/// [`TcpStream`], and a read that waits never holds up a write.
#[derive(Debug)]
pub struct Socket {
    tcp: TcpStream,
    /// `None` on a plain connection, which then is a [`TcpStream`] and nothing else.
    encrypted: Option<Arc<Encrypted>>,
}

#[derive(Debug)]
struct Encrypted {
    records: Records,
    peer: Identity,
}

impl Socket {
    pub(crate) fn encrypted(tcp: TcpStream, records: Records, peer: Identity) -> Socket {
        Socket { tcp, encrypted: Some(Arc::new(Encrypted { records, peer })) }
    }

    /// The connection underneath, to tune, to shut or to wait for; never to read from or to write to.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Who is at the other end; `None` on a plain connection, where nobody knows.
    pub fn peer(&self) -> Option<&Identity> {
        self.encrypted.as_deref().map(|encrypted| &encrypted.peer)
    }

    /// Another handle on the same connection.
    ///
    /// # Errors
    /// If the system gives none.
    pub fn try_clone(&self) -> io::Result<Socket> {
        Ok(Socket { tcp: self.tcp.try_clone()?, encrypted: self.encrypted.clone() })
    }

    /// Ends the connection, for both sides and every handle.
    ///
    /// # Errors
    /// If it has ended.
    pub fn shutdown(&self) -> io::Result<()> {
        self.tcp.shutdown(Shutdown::Both)
    }

    /// How long a read waits; `None` for ever.
    ///
    /// # Errors
    /// Of the system.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.tcp.set_read_timeout(limit)
    }

    /// How long a write waits; `None` for ever.
    ///
    /// # Errors
    /// Of the system.
    pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.tcp.set_write_timeout(limit)
    }

    /// Whether a read would find something that has left the system's own buffers, which nothing that waits for the descriptor
    /// sees. Never so on a plain connection.
    pub fn has_buffered(&self) -> bool {
        self.encrypted.as_deref().is_some_and(|encrypted| encrypted.records.has_buffered())
    }
}

impl From<TcpStream> for Socket {
    /// A plain one.
    fn from(tcp: TcpStream) -> Socket {
        Socket { tcp, encrypted: None }
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self.encrypted.as_deref() {
            None => self.tcp.read(out),
            Some(encrypted) => encrypted.records.read(&self.tcp, out),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.encrypted.as_deref() {
            None => self.tcp.write(bytes),
            Some(encrypted) => encrypted.records.write_vectored(&self.tcp, &[IoSlice::new(bytes)]),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.encrypted.as_deref() {
            None => self.tcp.write_vectored(parts),
            Some(encrypted) => encrypted.records.write_vectored(&self.tcp, parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // What is written is out.
        Ok(())
    }
}

impl AsFd for Socket {
    /// To wait for; see [`Socket::has_buffered`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}
