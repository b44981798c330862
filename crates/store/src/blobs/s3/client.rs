//! Requests: signed, bounded in time, sent again where that may help.
//!
//! Every request here may be repeated without harm: objects are written whole, under names that belong to their bytes or
//! to one upload. So what was cut, timed out or met an overloaded service is sent again, a few times, after a wait that
//! doubles.

use super::address::S3Address;
use super::credentials::Credentials;
use super::sign::{self, Signed};
use super::{time, xml};
use crate::blobs::error::BlobError;
use crate::blobs::store::BlobOptions;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

/// Longest answer that is not an object: a page of a list.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Longest wait between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// A request before it is signed.
#[derive(Debug, Clone)]
pub(super) struct Request {
    method: Method,
    /// Below the prefix; `None` is the bucket itself.
    path: Option<String>,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Request {
    pub(super) fn new(method: Method, path: &str) -> Request {
        Request { path: Some(path.into()), ..Request::bucket(method) }
    }

    pub(super) fn bucket(method: Method) -> Request {
        Request { method, path: None, query: Vec::new(), headers: Vec::new(), body: Bytes::new() }
    }

    pub(super) fn query(mut self, name: &str, value: &str) -> Request {
        self.query.push((name.into(), value.into()));
        self
    }

    /// `name` in lower case.
    pub(super) fn header(mut self, name: &str, value: &str) -> Request {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(super) fn body(mut self, body: Bytes) -> Request {
        self.body = body;
        self
    }

    /// For messages: what is wanted, without what is in it.
    fn what(&self) -> String {
        format!("{} of {}", self.method, self.path.as_deref().unwrap_or("the bucket"))
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The service's clock.
    pub(super) fn now(&self) -> SystemTime {
        service_time(&self.headers).unwrap_or_else(SystemTime::now)
    }

    pub(super) fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    pub(super) fn text(&self) -> Result<&str, BlobError> {
        std::str::from_utf8(&self.body).map_err(|_| not_understood("an answer"))
    }
}

fn service_time(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get("date")?.to_str().ok()?).ok()
}

/// The service says something that no service should.
pub(super) fn not_understood(what: &str) -> BlobError {
    BlobError::Unavailable(format!("{what} of the blob service cannot be understood"))
}

/// Why an attempt failed.
enum Failure {
    /// Another may succeed.
    Passing(String),
    Final(BlobError),
}

/// A bucket's client. Connections are kept and shared.
pub(super) struct Client {
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
    endpoint: String,
    host: String,
    bucket: String,
    prefix: String,
    region: String,
    credentials: Credentials,
    /// Longest time of one attempt, and longest silence while an object is read.
    pub(super) timeout: Duration,
    pub(super) attempts: u32,
    backoff: Duration,
    /// The service's clock minus ours, in seconds, once it has refused us for it.
    skew: AtomicI64,
}

impl Client {
    pub(super) fn new(
        address: &S3Address,
        credentials: Credentials,
        options: &BlobOptions,
    ) -> Result<Client, BlobError> {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_MAX.min(options.timeout)));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls(address.ca.as_deref())?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let host = address.endpoint.split_once("://").map_or("", |(_, host)| host).to_owned();
        Ok(Client {
            http: HttpClient::builder(TokioExecutor::new()).build(connector),
            endpoint: address.endpoint.clone(),
            host,
            bucket: address.bucket.clone(),
            prefix: if address.prefix.is_empty() { String::new() } else { format!("{}/", address.prefix) },
            region: address.region.clone(),
            credentials,
            timeout: options.timeout,
            attempts: options.attempts.max(1),
            backoff: options.backoff,
            skew: AtomicI64::new(0),
        })
    }

    /// The key of an object.
    pub(super) fn full(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    /// The inverse of [`full`](Client::full).
    pub(super) fn relative(&self, key: &str) -> Option<String> {
        key.strip_prefix(&self.prefix).map(Into::into)
    }

    /// How a copy names its source.
    pub(super) fn copy_source(&self, path: &str) -> String {
        sign::encode(&format!("/{}/{}", self.bucket, self.full(path)), true)
    }

    /// Sends a request and reads the whole answer: a success, or "not there" (404, 416).
    pub(super) async fn call(&self, request: &Request) -> Result<Reply, BlobError> {
        self.send(request, false).await.map(|(reply, _)| reply)
    }

    /// As [`call`](Client::call), where "not there" means that the bucket is not.
    pub(super) async fn call_existing(&self, request: &Request) -> Result<Reply, BlobError> {
        let reply = self.call(request).await?;
        if reply.status.is_success() { Ok(reply) } else { Err(refused(request, &reply)) }
    }

    /// Sends a request; a success comes with its body unread, anything else as [`call`](Client::call) has it.
    pub(super) async fn open(&self, request: &Request) -> Result<(Reply, Option<Incoming>), BlobError> {
        self.send(request, true).await
    }

    async fn send(&self, request: &Request, stream: bool) -> Result<(Reply, Option<Incoming>), BlobError> {
        let mut reason = String::new();
        for count in 0..self.attempts {
            if count > 0 {
                self.pause(count).await;
            }
            match tokio::time::timeout(self.timeout, self.attempt(request, stream)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(why))) => reason = why,
                Err(_) => reason = format!("no answer within {:?}", self.timeout),
            }
        }
        Err(BlobError::Unavailable(format!("{}: {reason}, {} attempts", request.what(), self.attempts)))
    }

    async fn attempt(&self, request: &Request, stream: bool) -> Result<(Reply, Option<Incoming>), Failure> {
        let (status, headers, body) = self.exchange(request).await?;
        if stream && status.is_success() {
            return Ok((Reply { status, headers, body: Bytes::new() }, Some(body)));
        }
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| Failure::Passing("its answer was cut or too long".into()))?.to_bytes();
        Ok((self.judge(request, Reply { status, headers, body })?, None))
    }

    /// Waits before attempt `count`: half of the time is fixed, half random, so that clients do not come back together.
    pub(super) async fn pause(&self, count: u32) {
        let full = self.backoff.saturating_mul(1 << (count - 1).min(16)).min(BACKOFF_MAX);
        let random = RandomState::new().hash_one(count) % 1024;
        let share = u32::try_from(random).unwrap_or(0);
        tokio::time::sleep(full / 2 + full / 2048 * share).await;
    }

    async fn exchange(&self, request: &Request) -> Result<(StatusCode, HeaderMap, Incoming), Failure> {
        let request = self.signed(request).map_err(Failure::Final)?;
        // The error's own words name no header and no body.
        let response = self.http.request(request).await.map_err(|error| Failure::Passing(cause(&error)))?;
        let (parts, body) = response.into_parts();
        Ok((parts.status, parts.headers, body))
    }

    fn signed(&self, request: &Request) -> Result<hyper::Request<Full<Bytes>>, BlobError> {
        let skew = self.skew.load(Ordering::Relaxed);
        let shift = Duration::from_secs(skew.unsigned_abs());
        let now = SystemTime::now();
        let moment = if skew < 0 { now.checked_sub(shift) } else { now.checked_add(shift) }.unwrap_or(now);
        let key = request.path.as_deref().map(|path| format!("/{}", self.full(path))).unwrap_or_default();
        let path = sign::encode(&format!("/{}{key}", self.bucket), true);
        let query = sign::query(&request.query);
        let body_digest = sign::digest_hex(&request.body);
        let mut headers = request.headers.clone();
        headers.push(("host".into(), self.host.clone()));
        headers.push(("x-amz-content-sha256".into(), body_digest.clone()));
        headers.push(("x-amz-date".into(), time::stamp(moment)));
        if let Some(token) = &self.credentials.session_token {
            headers.push(("x-amz-security-token".into(), token.clone()));
        }
        let method = request.method.as_str();
        let signed =
            Signed { method, path: &path, query: &query, headers: &headers, body_digest: &body_digest };
        let authorization = sign::authorization(&signed, &self.credentials, &self.region, moment);
        headers.push(("authorization".into(), authorization));
        let mark = if query.is_empty() { "" } else { "?" };
        let mut built = hyper::Request::builder()
            .method(&request.method)
            .uri(format!("{}{path}{mark}{query}", self.endpoint));
        for (name, value) in headers {
            let mut value = HeaderValue::from_str(&value).map_err(|_| {
                BlobError::Invalid("a credential cannot stand in a header: write it anew".into())
            })?;
            value.set_sensitive(name == "authorization" || name == "x-amz-security-token");
            built = built.header(name, value);
        }
        built
            .body(Full::new(request.body.clone()))
            .map_err(|_| BlobError::Address("the endpoint of the blob service makes no address".into()))
    }

    /// What an answer means for the request.
    fn judge(&self, request: &Request, reply: Reply) -> Result<Reply, Failure> {
        let code = code(&reply);
        // Some operations begin to answer before they know how they end, so a success may hold an error.
        let status = match reply.status {
            status if status.is_success() => match code.as_deref() {
                None => return Ok(reply),
                Some(_) => StatusCode::INTERNAL_SERVER_ERROR,
            },
            status => status,
        };
        let named = code.as_deref().unwrap_or_else(|| status.as_str());
        let full =
            ["QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage"];
        if status == StatusCode::INSUFFICIENT_STORAGE || full.contains(&named) {
            return Err(Failure::Final(BlobError::Full { place: format!("bucket {}", self.bucket) }));
        }
        if named == "RequestTimeTooSkewed" && self.follow_clock(&reply) {
            return Err(Failure::Passing("our clock differs from the service's".into()));
        }
        let passing = matches!(status.as_u16(), 408 | 425 | 429) || status.is_server_error();
        if passing || matches!(named, "RequestTimeout" | "SlowDown" | "OperationAborted") {
            return Err(Failure::Passing(format!("it answers {named}")));
        }
        let absent = matches!(status, StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE);
        if absent && named != "NoSuchBucket" {
            Ok(reply)
        } else {
            Err(Failure::Final(refused(request, &reply)))
        }
    }

    /// Signs with the service's time from now on. Whether that changes anything.
    fn follow_clock(&self, reply: &Reply) -> bool {
        let Some(theirs) = service_time(&reply.headers) else { return false };
        let now = SystemTime::now();
        let seconds = |later: SystemTime, earlier| {
            later.duration_since(earlier).map_or(0, |gap| i64::try_from(gap.as_secs()).unwrap_or(0))
        };
        let skew = seconds(theirs, now) - seconds(now, theirs);
        let before = self.skew.swap(skew, Ordering::Relaxed);
        (skew - before).abs() > 1
    }
}

/// The reason that the service names, if any.
fn code(reply: &Reply) -> Option<String> {
    let text = reply.text().ok()?;
    let code = xml::text(xml::blocks(text, "Error").next()?, "Code")?;
    // It comes from outside and goes into messages.
    let plain = code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    Some(if plain { code } else { "an unknown code".into() })
}

fn refused(request: &Request, reply: &Reply) -> BlobError {
    let code = code(reply).unwrap_or_else(|| reply.status.as_str().to_owned());
    BlobError::Refused { what: request.what(), code }
}

/// The innermost cause, which says most.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn tls(ca: Option<&Path>) -> Result<rustls::ClientConfig, BlobError> {
    let mut roots = rustls::RootCertStore::empty();
    match ca {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(path) => {
            let unusable =
                || BlobError::Address(format!("the certificates in {} cannot be used", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|_| unusable())? {
                roots.add(certificate.map_err(|_| unusable())?).map_err(|_| unusable())?;
            }
            if roots.is_empty() {
                return Err(unusable());
            }
        }
    }
    // Named here, so that no default for the whole process is needed.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| BlobError::Address("tls is not available for the blob service".into()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
