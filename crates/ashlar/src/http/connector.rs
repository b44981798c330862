//! Connections to a service: in the clear, or encrypted.

use ashlar_identity::web::{ClientStream, WebClient};
use hyper::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::net::TcpStream;
use tower_service::Service;

/// Opens connections.
#[derive(Debug, Clone)]
pub(super) struct Connector {
    /// Where addresses are `https://`.
    pub(super) web: Option<WebClient>,
}

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(TokioIo<TcpStream>),
    Encrypted(Box<TokioIo<ClientStream>>),
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let web = self.web.clone();
        Box::pin(async move {
            let host = uri.host().ok_or_else(|| io::Error::other("an address needs a host"))?;
            let port = uri.port_u16().unwrap_or(if web.is_some() { 443 } else { 80 });
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            let socket = TcpStream::connect((bare, port)).await?;
            // A long body must not wait for the acknowledgement of its first part.
            socket.set_nodelay(true)?;
            Ok(match web {
                None => Stream::Plain(TokioIo::new(socket)),
                Some(web) => Stream::Encrypted(Box::new(TokioIo::new(web.connect(bare, socket).await?))),
            })
        })
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Encrypted(stream) => Pin::new(stream.as_mut()).poll_read(context, buffer),
        }
    }
}

impl Write for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Encrypted(stream) => Pin::new(stream.as_mut()).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Encrypted(stream) => Pin::new(stream.as_mut()).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Encrypted(stream) => Pin::new(stream.as_mut()).poll_shutdown(context),
        }
    }
}
