//! The least HTTP client that an OTLP exporter needs: plain HTTP/1.1, blocking, one request per connection.
//!
//! The exporter runs on a thread of its own, outside every async runtime, so blocking is what it wants; and it ends
//! within its time-outs even while the runtime is going down. TLS is for a collector beside the process to do.

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::pin::Pin;
use std::time::Duration;

/// Longest wait for the connection, for writing and for each read.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct PlainHttpClient;

impl HttpClient for PlainHttpClient {
    fn send_bytes<'life0, 'async_trait>(
        &'life0 self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(async move { send(&request) })
    }
}

fn send(request: &Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let uri = request.uri();
    if uri.scheme_str() != Some("http") {
        return Err("only http:// collectors are possible: run one on this host".into());
    }
    let host = uri.host().ok_or("the collector's address has no host")?;
    let address = (host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(80))
        .to_socket_addrs()?
        .next()
        .ok_or("the collector's host has no address")?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let mut head =
        format!("{} {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n", request.method())
            .into_bytes();
    for (name, value) in request.headers() {
        if !matches!(name.as_str(), "host" | "connection" | "content-length" | "transfer-encoding") {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
    }
    head.extend_from_slice(format!("content-length: {}\r\n\r\n", request.body().len()).as_bytes());
    stream.write_all(&head)?;
    stream.write_all(request.body())?;
    let mut answer = Vec::new();
    match stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer) {
        Ok(_) => {}
        // A server that keeps the connection open has still answered.
        Err(_) if !answer.is_empty() => {}
        Err(error) => return Err(error.into()),
    }
    // The body of an answer to an export says nothing that is acted on; the status does.
    let status = answer
        .strip_prefix(b"HTTP/1.1 ")
        .or_else(|| answer.strip_prefix(b"HTTP/1.0 "))
        .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse::<u16>().ok())
        .ok_or("the collector does not answer in HTTP")?;
    Ok(Response::builder().status(status).body(Bytes::new())?)
}
