//! A plain HTTP/1.1 client for our own commands: JSON in, JSON or server-sent events out.

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use std::time::Instant;

/// The service answered with an error status.
#[derive(Debug, thiserror::Error)]
#[error("{status}: {message}")]
pub(crate) struct StatusError {
    /// The status.
    pub(crate) status: hyper::StatusCode,
    /// The service's message.
    pub(crate) message: String,
}

/// A client of one service.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    inner: HyperClient<HttpConnector, Full<Bytes>>,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the service at `base` (`http://host:port`, with or without `/v1`).
    pub(crate) fn new(base: &str, key: Option<String>) -> Result<Client> {
        let base = base.trim_end_matches('/').trim_end_matches("/v1");
        if !base.starts_with("http://") {
            bail!("`{base}` is not an http:// address (TLS: put a local proxy in front)");
        }
        let mut connector = HttpConnector::new();
        // A long body must not wait for the acknowledgement of its first part.
        connector.set_nodelay(true);
        let inner = HyperClient::builder(TokioExecutor::new()).build(connector);
        Ok(Client { inner, base: base.to_owned(), key })
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response<Incoming>> {
        let uri: Uri = format!("{}{path}", self.base).parse().context("bad address")?;
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let bytes = match body {
            Some(json) => {
                request = request.header("content-type", "application/json");
                Bytes::from(json.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes))?;
        self.inner.request(request).await.with_context(|| format!("cannot reach {}", self.base))
    }

    /// GET: status and JSON (null where the body is none).
    pub(crate) async fn get(&self, path: &str) -> Result<(u16, Value)> {
        let response = self.send(Method::GET, path, None).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }

    /// POST with `stream: true`; an error status becomes an error with the service's message.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Result<EventStream> {
        let response = self.send(Method::POST, path, Some(body)).await?;
        let status = response.status();
        if !status.is_success() {
            let bytes = response.into_body().collect().await?.to_bytes();
            let json: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            let message = json["error"]["message"].as_str().unwrap_or("no message").to_owned();
            return Err(StatusError { status, message }.into());
        }
        Ok(EventStream { body: response.into_body(), buffer: Vec::new(), received: Instant::now() })
    }
}

/// Server-sent events of one answer.
#[derive(Debug)]
pub(crate) struct EventStream {
    body: Incoming,
    buffer: Vec<u8>,
    received: Instant,
}

impl EventStream {
    /// When the bytes that completed the last event arrived, before it was parsed.
    pub(crate) fn received(&self) -> Instant {
        self.received
    }

    /// The next event's JSON; `None` after `[DONE]` or the end. An error event becomes an error.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let Some(data) = line.trim().strip_prefix("data:") else { continue };
                if data.trim() == "[DONE]" {
                    return Ok(None);
                }
                let json: Value = serde_json::from_str(data).context("undecodable event")?;
                if let Some(message) = json["error"]["message"].as_str() {
                    bail!("{message}");
                }
                return Ok(Some(json));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    self.received = Instant::now();
                    if let Ok(data) = frame.context("the stream broke off")?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}
