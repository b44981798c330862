//! One client connection.

use super::stall::StallGuard;
use crate::app::{Phase, reached};
use ashlar_identity::web::WebServer;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Bytes of a request's head, and of an answer that waits for the socket.
const BUFFER_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;

const REFUSAL_BODY: &str = "{\"error\":{\"message\":\"too many connections are open: retry in a moment\",\
     \"type\":\"service_unavailable_error\",\"param\":null,\"code\":null}}";

#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionSettings {
    /// Until a request's head has to be there; between requests too.
    pub(super) head_timeout: Duration,
    /// For which the client may take nothing.
    pub(super) write_timeout: Duration,
}

/// Serves a client: in the clear, or after a handshake, for which it has as long as for a request's head.
pub(super) async fn serve_socket(
    socket: TcpStream,
    web: Option<Arc<WebServer>>,
    router: Router,
    settings: ConnectionSettings,
    phase: watch::Receiver<Phase>,
) {
    // A token is smaller than a segment and must not wait for the next.
    let _ = socket.set_nodelay(true);
    let Some(web) = web else { return serve_connection(socket, router, settings, phase).await };
    match tokio::time::timeout(settings.head_timeout, web.accept(socket)).await {
        Ok(Ok(stream)) => serve_connection(stream, router, settings, phase).await,
        Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
}

/// Serves one connection until it ends; from the drain on, no further request is taken on it.
async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    socket: S,
    router: Router,
    settings: ConnectionSettings,
    mut phase: watch::Receiver<Phase>,
) {
    let io = TokioIo::new(StallGuard::new(socket, settings.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.head_timeout)
        .max_buf_size(BUFFER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(io, TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = reached(&mut phase, Phase::Draining) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // Clients come and go; nobody has to act on it.
        tracing::debug!(%error, "connection ended");
    }
}

/// Tells a client that there is no place for it.
pub(super) async fn refuse(mut socket: TcpStream) {
    let response = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{REFUSAL_BODY}",
        REFUSAL_BODY.len()
    );
    let answer = async {
        // A client that is answered before it has asked takes that for an error of the protocol.
        let mut head = [0; 1_024];
        if socket.read(&mut head).await? == 0 {
            return Ok(());
        }
        socket.write_all(response.as_bytes()).await?;
        socket.shutdown().await
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), answer).await;
}
