//! One client connection.

use super::places::{Busy, Place};
use super::stall::StallGuard;
use crate::app::{Phase, reached};
use ashlar_identity::web::WebServer;
use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tower::ServiceExt;

/// Bytes of a request's head, and of an answer that waits for the socket: with those of a TLS record less than 64 KiB for whoever has not
/// shown a key yet.
const BUFFER_BYTES_MAX: usize = 32 << 10;
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
    (place, phase): (Place, watch::Receiver<Phase>),
) {
    // A token is smaller than a segment and must not wait for the next.
    let _ = socket.set_nodelay(true);
    let Some(web) = web else { return serve_connection(socket, router, settings, (place, phase)).await };
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(settings.head_timeout, web.accept(socket)) => accepted,
        () = place.wanted() => return,
    };
    match accepted {
        Ok(Ok(stream)) => serve_connection(stream, router, settings, (place, phase)).await,
        Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
}

/// Serves one connection until it ends; from the drain on, no further request is taken on it.
async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    socket: S,
    router: Router,
    settings: ConnectionSettings,
    (place, mut phase): (Place, watch::Receiver<Phase>),
) {
    let place = Arc::new(place);
    let held = place.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, busy) = (router.clone(), held.begin());
        async move {
            let answer = router.oneshot(request.map(Body::new)).await?;
            Ok::<_, Infallible>(answer.map(|body| Body::new(Answering { body, _busy: busy })))
        }
    });
    let io = TokioIo::new(StallGuard::new(socket, settings.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.head_timeout)
        .max_buf_size(BUFFER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(io, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = reached(&mut phase, Phase::Draining) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = place.wanted() => {
            if !place.is_busy() {
                return;
            }
            // A request came just then: it is answered still.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // Clients come and go; nobody has to act on it.
        tracing::debug!(%error, "connection ended");
    }
}

/// The body of an answer; until it is sent, its connection is busy.
struct Answering {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
