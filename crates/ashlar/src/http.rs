//! A plain HTTP/1.1 client for our own commands: JSON or a file in, JSON or server-sent events out.

mod connector;
mod upload;

use anyhow::{Context, Result, bail};
use ashlar_identity::web::WebClient;
use bytes::Bytes;
use clap::Args;
use connector::Connector;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::rt::TokioExecutor;
use indicatif::ProgressBar;
use serde_json::Value;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Instant;
use upload::Form;

/// Where a gateway listens unless it is told otherwise.
pub(crate) const DEFAULT_URL: &str = "http://127.0.0.1:8080";
/// Names a file of authorities that clients trust.
const CA_VARIABLE: &str = "ASHLAR_CA";

/// The service answered with an error status.
#[derive(Debug, thiserror::Error)]
#[error("{status}: {message}")]
pub(crate) struct StatusError {
    /// The status.
    pub(crate) status: hyper::StatusCode,
    /// The service's message.
    pub(crate) message: String,
}

/// Whether the service has refused, so that asking again is of no use.
pub(crate) fn is_refusal(error: &anyhow::Error) -> bool {
    let status = error.downcast_ref::<StatusError>().map(|error| error.status);
    status.is_some_and(|status| status.is_client_error() && status != hyper::StatusCode::TOO_MANY_REQUESTS)
}

type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

/// Which service a command asks, and as whom.
#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    /// Address of a gateway.
    #[arg(long, global = true, default_value = DEFAULT_URL)]
    pub(crate) url: String,
    /// API key, if the gateway wants one.
    #[arg(long, global = true, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
}

impl GatewayArgs {
    /// A client of it.
    pub(crate) fn client(&self) -> Result<Client> {
        Client::new(&self.url, self.key.clone())
    }
}

/// A client of one service.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    inner: HyperClient<Connector, RequestBody>,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the service at `base` (`http://host:port` or `https://host:port`, with or without `/v1`). `ASHLAR_CA` names a file
    /// of authorities to trust instead of those that browsers trust.
    pub(crate) fn new(base: &str, key: Option<String>) -> Result<Client> {
        let web = match base.starts_with("https://") {
            true => Some(WebClient::new(std::env::var_os(CA_VARIABLE).map(PathBuf::from).as_deref())?),
            false => None,
        };
        Client::trusting(base, key, web)
    }

    /// The same, where it is known already whom to trust.
    pub(crate) fn trusting(base: &str, key: Option<String>, web: Option<WebClient>) -> Result<Client> {
        let base = base.trim_end_matches('/').trim_end_matches("/v1");
        if !base.starts_with("http://") && !base.starts_with("https://") {
            bail!("`{base}` is neither an http:// nor an https:// address");
        }
        let inner = HyperClient::builder(TokioExecutor::new()).build(Connector { web });
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
        let request = request.body(Full::new(bytes).map_err(|never| match never {}).boxed_unsync())?;
        self.inner.request(request).await.with_context(|| format!("cannot reach {}", self.base))
    }

    /// GET: status and JSON (null where the body is none).
    pub(crate) async fn get(&self, path: &str) -> Result<(u16, Value)> {
        let response = self.send(Method::GET, path, None).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }

    /// GET: the JSON; an error status becomes an error with the service's message.
    pub(crate) async fn get_ok(&self, path: &str) -> Result<Value> {
        json_of(ok(self.send(Method::GET, path, None).await?).await?).await
    }

    /// POST: the JSON; an error status becomes an error with the service's message.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        json_of(ok(self.send(Method::POST, path, Some(body)).await?).await?).await
    }

    /// PATCH: the JSON; an error status becomes an error with the service's message.
    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        json_of(ok(self.send(Method::PATCH, path, Some(body)).await?).await?).await
    }

    /// DELETE: the JSON; an error status becomes an error with the service's message.
    pub(crate) async fn delete(&self, path: &str) -> Result<Value> {
        json_of(ok(self.send(Method::DELETE, path, None).await?).await?).await
    }

    /// POST of a form with short texts and one file, which is read as it is sent; `bar` shows how far it is.
    pub(crate) async fn upload(
        &self,
        path: &str,
        texts: &[(&str, &str)],
        name: &str,
        file: File,
        bar: &ProgressBar,
    ) -> Result<Value> {
        let form = Form::new(texts, name, file, bar.clone())?;
        let uri: Uri = format!("{}{path}", self.base).parse().context("bad address")?;
        let mut request =
            Request::builder().method(Method::POST).uri(uri).header("content-type", form.content_type());
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let sent = self.inner.request(request.body(form.boxed_unsync())?).await;
        json_of(ok(sent.with_context(|| format!("cannot reach {}", self.base))?).await?).await
    }

    /// GET of a file into `to`, whole or not at all as far as the service says its length; gives that. An error status becomes
    /// an error with the service's message.
    pub(crate) async fn download(&self, path: &str, to: &mut impl io::Write) -> Result<u64> {
        let mut body = ok(self.send(Method::GET, path, None).await?).await?.into_body();
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.context("the download broke off")?.into_data() {
                to.write_all(&data)?;
                bytes += data.len() as u64;
            }
        }
        Ok(bytes)
    }

    /// GET of server-sent events; an error status becomes an error with the service's message.
    pub(crate) async fn follow(&self, path: &str) -> Result<EventStream> {
        Ok(EventStream::of(ok(self.send(Method::GET, path, None).await?).await?))
    }

    /// POST with `stream: true`; an error status becomes an error with the service's message.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Result<EventStream> {
        Ok(self.try_stream(path, body).await??)
    }

    /// The same for those who expect to be refused: an error status is an answer.
    pub(crate) async fn try_stream(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<Result<EventStream, StatusError>> {
        Ok(checked(self.send(Method::POST, path, Some(body)).await?).await?.map(EventStream::of))
    }
}

/// The response, if its status is a success.
async fn ok(response: Response<Incoming>) -> Result<Response<Incoming>> {
    Ok(checked(response).await??)
}

async fn checked(response: Response<Incoming>) -> Result<Result<Response<Incoming>, StatusError>> {
    let status = response.status();
    if status.is_success() {
        return Ok(Ok(response));
    }
    let bytes = response.into_body().collect().await?.to_bytes();
    let json: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let message = json["error"]["message"].as_str().unwrap_or("no message").to_owned();
    Ok(Err(StatusError { status, message }))
}

async fn json_of(response: Response<Incoming>) -> Result<Value> {
    let bytes = response.into_body().collect().await?.to_bytes();
    serde_json::from_slice(&bytes).context("the answer is not JSON")
}

/// Server-sent events of one answer.
#[derive(Debug)]
pub(crate) struct EventStream {
    body: Incoming,
    buffer: Vec<u8>,
    received: Instant,
}

impl EventStream {
    fn of(response: Response<Incoming>) -> EventStream {
        EventStream { body: response.into_body(), buffer: Vec::new(), received: Instant::now() }
    }

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
