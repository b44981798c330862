//! Asynchronous connections: plain, or encrypted.

use crate::name::Identity;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::TlsStream;

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// In the clear.
    Plain(TcpStream),
    /// Encrypted, and who is at the other end; `None` for whoever enrols.
    Encrypted(Box<TlsStream<TcpStream>>, Option<Identity>),
}

/// Where a connection is read.
#[derive(Debug)]
pub enum ReadHalf {
    /// In the clear.
    Plain(OwnedReadHalf),
    /// Encrypted.
    Encrypted(tokio::io::ReadHalf<TlsStream<TcpStream>>),
}

/// Where a connection is written. Say [`shutdown`](tokio::io::AsyncWriteExt::shutdown) at the end; a plain one also ends when it is
/// dropped.
#[derive(Debug)]
pub enum WriteHalf {
    /// In the clear.
    Plain(OwnedWriteHalf),
    /// Encrypted.
    Encrypted(tokio::io::WriteHalf<TlsStream<TcpStream>>),
}

impl Stream {
    /// Who is at the other end; `None` where nobody knows.
    pub fn peer(&self) -> Option<&Identity> {
        match self {
            Stream::Plain(_) => None,
            Stream::Encrypted(_, peer) => peer.as_ref(),
        }
    }

    /// Both halves, for two tasks.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Stream::Plain(tcp) => {
                let (read, write) = tcp.into_split();
                (ReadHalf::Plain(read), WriteHalf::Plain(write))
            }
            Stream::Encrypted(tls, _) => {
                let (read, write) = tokio::io::split(*tls);
                (ReadHalf::Encrypted(read), WriteHalf::Encrypted(write))
            }
        }
    }
}

/// A process that ends says nothing any more. Messages have lengths and checksums of their own, so nothing is taken for whole that
/// is not.
fn ended(read: io::Result<()>) -> io::Result<()> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        read => read,
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(cx, out),
            Stream::Encrypted(tls, _) => Poll::Ready(ended(ready!(Pin::new(tls).poll_read(cx, out)))),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ReadHalf::Plain(tcp) => Pin::new(tcp).poll_read(cx, out),
            ReadHalf::Encrypted(tls) => Poll::Ready(ended(ready!(Pin::new(tls).poll_read(cx, out)))),
        }
    }
}

/// Both kinds of writers forward everything.
macro_rules! forward_writes {
    ($type:ident, $($pattern:pat => $inner:ident),+) => {
        impl AsyncWrite for $type {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($pattern => Pin::new($inner).poll_write(cx, bytes)),+
                }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($pattern => Pin::new($inner).poll_flush(cx)),+
                }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($pattern => Pin::new($inner).poll_shutdown(cx)),+
                }
            }
        }
    };
}

forward_writes!(Stream, Stream::Plain(inner) => inner, Stream::Encrypted(inner, _) => inner);
forward_writes!(WriteHalf, WriteHalf::Plain(inner) => inner, WriteHalf::Encrypted(inner) => inner);
