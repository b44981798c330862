//! A small S3 on loopback: what the store needs of it, with checked signatures and faults on demand.

use crate::signature;
use crate::suite::Place;
use ashlar_store::blobs::open::open_s3;
use ashlar_store::blobs::{BlobOptions, Blobs, Credentials, S3Address};
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

pub(crate) const ACCESS: &str = "access-hidden-word";
pub(crate) const SECRET: &str = "secret-hidden-word";
pub(crate) const TOKEN: &str = "token-hidden-word";
pub(crate) const BUCKET: &str = "bucket";
const PREFIX: &str = "some/where/";

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// It is answered with this and a code.
    Answer(u16, &'static str),
    /// A success that holds an error, as slow operations have it.
    LateError,
    /// The connection ends before anything is done.
    Cut,
    /// It is done, but the connection ends before the answer.
    LoseAnswer,
    /// The answer's body ends after so many bytes.
    CutBody(usize),
    /// The answer's body stops after so many bytes, and nothing more comes.
    StallBody(usize),
    /// The answer's body has a flipped bit.
    Flip,
    /// No answer comes.
    Hang,
    /// It is done, and answered a moment later.
    Slow,
}

/// Faults for requests whose method and address contain this, as often as told.
struct Rule {
    method: Method,
    part: &'static str,
    fault: Fault,
    times: usize,
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    written: SystemTime,
}

struct Upload {
    key: String,
    parts: BTreeMap<u32, Bytes>,
    begun: SystemTime,
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Upload>,
    rules: Vec<Rule>,
    requests: Vec<String>,
    next_upload: u64,
    /// How far its clock is ahead.
    ahead: Duration,
}

/// The service. It ends with its runtime.
#[derive(Clone)]
pub(crate) struct FakeS3 {
    inner: Arc<Mutex<Inner>>,
    address: SocketAddr,
}

impl FakeS3 {
    pub(crate) async fn start() -> FakeS3 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = FakeS3 { inner: Arc::default(), address: listener.local_addr().unwrap() };
        let router = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    pub(crate) fn address(&self) -> S3Address {
        let text = format!("s3://{BUCKET}/{PREFIX}?endpoint=http://{}&region=eu-test-1", self.address);
        S3Address::parse(&text).unwrap()
    }

    pub(crate) fn credentials() -> Credentials {
        Credentials::new(ACCESS, SECRET, Some(TOKEN)).unwrap()
    }

    pub(crate) fn open(&self, options: &BlobOptions) -> Blobs {
        open_s3(&self.address(), FakeS3::credentials(), options).unwrap()
    }

    pub(crate) fn fail(&self, method: Method, part: &'static str, fault: Fault, times: usize) {
        self.lock().rules.push(Rule { method, part, fault, times });
    }

    /// Whether every fault has happened as often as told; forgets those that have not.
    pub(crate) fn all_failed(&self) -> bool {
        let rules = std::mem::take(&mut self.lock().rules);
        rules.iter().all(|rule| rule.times == 0)
    }

    /// Whether every fault has happened as often as told, so far.
    pub(crate) fn has_failed(&self) -> bool {
        self.lock().rules.iter().all(|rule| rule.times == 0)
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().requests)
    }

    pub(crate) fn set_clock_ahead(&self, ahead: Duration) {
        self.lock().ahead = ahead;
    }

    pub(crate) fn put(&self, path: &str, bytes: &'static [u8]) {
        let object = Object { bytes: bytes.into(), written: SystemTime::now() };
        self.lock().objects.insert(format!("{PREFIX}{path}"), object);
    }

    pub(crate) fn make_uploads_old(&self, age: Duration) {
        self.lock().uploads.values_mut().for_each(|upload| upload.begun = SystemTime::now() - age);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
}

impl Place for FakeS3 {
    fn objects(&self) -> Vec<String> {
        let inner = self.lock();
        let mut found: Vec<_> =
            inner.objects.keys().map(|key| key.strip_prefix(PREFIX).unwrap().to_owned()).collect();
        found.sort_by_key(|path| !path.starts_with("sha256"));
        found
    }

    fn change(&self, path: &str, change: &dyn Fn(&mut Vec<u8>)) {
        let mut inner = self.lock();
        let object = inner.objects.get_mut(&format!("{PREFIX}{path}")).unwrap();
        let mut bytes = object.bytes.to_vec();
        change(&mut bytes);
        object.bytes = bytes.into();
    }

    fn remove(&self, path: &str) {
        self.lock().objects.remove(&format!("{PREFIX}{path}")).unwrap();
    }

    fn make_old(&self, path: &str, age: Duration) {
        let mut inner = self.lock();
        inner.objects.get_mut(&format!("{PREFIX}{path}")).unwrap().written = SystemTime::now() - age;
    }

    fn uploads(&self) -> usize {
        self.lock().uploads.len()
    }
}

type Answer = Response<Body>;

fn plain(status: u16, body: impl Into<Body>) -> Answer {
    Response::builder().status(status).body(body.into()).unwrap()
}

fn error(status: u16, code: &str) -> Answer {
    // Services repeat much of the request in their errors.
    plain(
        status,
        format!(
            "<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code><Message>{ACCESS} {SECRET}</Message></Error>"
        ),
    )
}

async fn answer(State(fake): State<FakeS3>, request: Request<Body>) -> Answer {
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, 64 << 20).await else { return error(400, "IncompleteBody") };
    let fault = {
        let mut inner = fake.lock();
        inner.requests.push(format!("{} {}", parts.method, parts.uri));
        let address = parts.uri.to_string();
        let rule = inner
            .rules
            .iter_mut()
            .find(|rule| rule.times > 0 && rule.method == parts.method && address.contains(rule.part));
        rule.map(|rule| {
            rule.times -= 1;
            rule.fault
        })
    };
    match fault {
        Some(Fault::Answer(status, code)) => return error(status, code),
        Some(Fault::LateError) => return error(200, "InternalError"),
        Some(Fault::Cut) => return cut("", None),
        Some(Fault::Hang) => std::future::pending().await,
        _ => {}
    }
    let mut answer = fake.lock().handle(&parts.method, &parts.uri, &parts.headers, &body);
    let now = SystemTime::now() + fake.lock().ahead;
    answer.headers_mut().insert("date", httpdate(now).parse().unwrap());
    let (head, whole) = answer.into_parts();
    let whole = to_bytes(whole, 64 << 20).await.unwrap();
    if matches!(fault, Some(Fault::Slow)) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    match fault {
        Some(Fault::LoseAnswer) => cut("", None),
        Some(Fault::CutBody(after) | Fault::StallBody(after)) => {
            let mut answer = cut(&whole.len().to_string(), Some(whole.slice(..after.min(whole.len()))));
            if matches!(fault, Some(Fault::StallBody(_))) {
                let first =
                    futures::stream::iter([Ok::<_, std::io::Error>(whole.slice(..after.min(whole.len())))]);
                let stalled = futures::StreamExt::chain(first, futures::stream::pending());
                *answer.body_mut() = Body::from_stream(stalled);
            }
            *answer.status_mut() = head.status;
            for (name, value) in &head.headers {
                answer.headers_mut().insert(name, value.clone());
            }
            answer
        }
        Some(Fault::Flip) => {
            let mut bytes = whole.to_vec();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            Response::from_parts(head, Body::from(bytes))
        }
        _ => Response::from_parts(head, Body::from(whole)),
    }
}

/// An answer whose connection ends before its body does.
fn cut(length: &str, first: Option<Bytes>) -> Answer {
    // What comes before is on its way by then; without, not even the head is.
    let pause = Duration::from_millis(if first.is_some() { 10 } else { 0 });
    let first = futures::stream::iter(first.map(Ok));
    let broken = futures::stream::once(async move {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        Err(std::io::Error::other("cut"))
    });
    let length = if length.is_empty() { "1000" } else { length };
    Response::builder()
        .status(200)
        .header("content-length", length)
        .body(Body::from_stream(futures::StreamExt::chain(first, broken)))
        .unwrap()
}

/// Whole seconds are all that the store reads.
fn httpdate(moment: SystemTime) -> String {
    httpdate::fmt_http_date(moment)
}

fn iso(moment: SystemTime) -> String {
    // From `Sun, 06 Nov 1994 08:49:37 GMT`.
    let text = httpdate(moment);
    let fields: Vec<&str> = text.split(' ').collect();
    let months = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let month = months.find(fields[2]).unwrap() / 3 + 1;
    format!("{}-{month:02}-{}T{}.000Z", fields[3], fields[1], fields[4])
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'%' {
            let code = std::str::from_utf8(&after[..2]).unwrap();
            bytes.push(u8::from_str_radix(code, 16).unwrap());
            rest = &after[2..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn tag(bytes: &[u8]) -> String {
    format!("\"{}\"", blake3::hash(bytes).to_hex())
}

impl Inner {
    fn now(&self) -> SystemTime {
        SystemTime::now() + self.ahead
    }

    fn handle(&mut self, method: &Method, uri: &Uri, headers: &HeaderMap, body: &Bytes) -> Answer {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if let Err(code) = signature::check(method, uri, headers, body, ACCESS, SECRET) {
            return error(403, code);
        }
        if text("x-amz-security-token") != Some(TOKEN) {
            return error(403, "InvalidToken");
        }
        // A quarter of an hour is what Amazon allows.
        let told = text("x-amz-date").unwrap();
        let form = |moment| iso(moment).replace(['-', ':'], "").replace(".000", "");
        let window = Duration::from_secs(900);
        if told < form(self.now() - window).as_str() || told > form(self.now() + window).as_str() {
            return error(403, "RequestTimeTooSkewed");
        }
        let path = decode(uri.path());
        let (bucket, key) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
        if bucket != BUCKET {
            return error(404, "NoSuchBucket");
        }
        let query: BTreeMap<String, String> = uri
            .query()
            .unwrap_or("")
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (decode(name), decode(value)))
            .collect();
        let has = |name: &str| query.contains_key(name);
        match method.as_str() {
            "GET" if key.is_empty() && has("uploads") => self.list_uploads(&query),
            "GET" if key.is_empty() => self.list(&query),
            "GET" | "HEAD" => self.get(key, text("range"), method == Method::HEAD),
            "PUT" => self.put(key, &query, text("x-amz-copy-source"), text("x-amz-copy-source-range"), body),
            "POST" if has("uploads") => {
                self.next_upload += 1;
                // Services choose characters that need care.
                let id = format!("up+load/{:04}=&", self.next_upload);
                let upload = Upload { key: key.into(), parts: BTreeMap::new(), begun: self.now() };
                self.uploads.insert(id.clone(), upload);
                let id = id.replace('&', "&amp;");
                plain(200, format!("<Result xmlns=\"x\"><Key>{key}</Key><UploadId>{id}</UploadId></Result>"))
            }
            "POST" => self.complete(key, &query["uploadId"], std::str::from_utf8(body).unwrap()),
            "DELETE" => match query.get("uploadId") {
                Some(id) if self.uploads.remove(id).is_none() => error(404, "NoSuchUpload"),
                Some(_) => plain(204, ""),
                None => {
                    self.objects.remove(key);
                    plain(204, "")
                }
            },
            _ => error(405, "MethodNotAllowed"),
        }
    }

    fn get(&self, key: &str, range: Option<&str>, head: bool) -> Answer {
        let Some(object) = self.objects.get(key) else {
            return if head { plain(404, "") } else { error(404, "NoSuchKey") };
        };
        let length = object.bytes.len();
        let answer = Response::builder().header("last-modified", httpdate(object.written));
        let Some(range) = range else {
            return answer.body(Body::from(object.bytes.clone())).unwrap();
        };
        let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let (start, last): (u64, u64) = (start.parse().unwrap(), last.parse().unwrap());
        assert!(start <= last, "no such range");
        if start >= length as u64 {
            return error(416, "InvalidRange");
        }
        let start = usize::try_from(start).unwrap();
        let end = usize::try_from(last.saturating_add(1)).unwrap().min(length);
        answer
            .status(206)
            .header("content-range", format!("bytes {start}-{}/{length}", end - 1))
            .body(Body::from(object.bytes.slice(start..end)))
            .unwrap()
    }

    fn put(
        &mut self,
        key: &str,
        query: &BTreeMap<String, String>,
        copy: Option<&str>,
        copy_range: Option<&str>,
        body: &Bytes,
    ) -> Answer {
        let bytes = match copy {
            None => body.clone(),
            Some(source) => {
                let source = decode(source);
                let source = source.strip_prefix(&format!("/{BUCKET}/")).unwrap();
                let Some(object) = self.objects.get(source) else { return error(404, "NoSuchKey") };
                match copy_range {
                    None => object.bytes.clone(),
                    Some(range) => {
                        let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                        object.bytes.slice(start.parse().unwrap()..last.parse::<usize>().unwrap() + 1)
                    }
                }
            }
        };
        let tag = tag(&bytes);
        let answer = if copy.is_some() {
            plain(200, format!("<CopyResult><ETag>{}</ETag></CopyResult>", tag.replace('"', "&quot;")))
        } else {
            Response::builder().header("etag", tag).body(Body::empty()).unwrap()
        };
        match query.get("uploadId") {
            Some(id) => {
                let Some(upload) = self.uploads.get_mut(id) else { return error(404, "NoSuchUpload") };
                assert_eq!(upload.key, key);
                let number: u32 = query["partNumber"].parse().unwrap();
                assert!((1..=10_000).contains(&number));
                upload.parts.insert(number, bytes);
            }
            None => {
                let written = self.now();
                self.objects.insert(key.into(), Object { bytes, written });
            }
        }
        answer
    }

    fn complete(&mut self, key: &str, id: &str, body: &str) -> Answer {
        let Some(upload) = self.uploads.get(id) else { return error(404, "NoSuchUpload") };
        let mut whole = Vec::new();
        let mut last = 0;
        for part in body.split("<Part>").skip(1) {
            let inside = |name: &str| {
                let after = part.split_once(&format!("<{name}>")).unwrap().1;
                after.split_once(&format!("</{name}>")).unwrap().0.replace("&quot;", "\"")
            };
            let number: u32 = inside("PartNumber").parse().unwrap();
            let known = upload.parts.get(&number);
            match known.filter(|bytes| number > last && tag(bytes) == inside("ETag")) {
                Some(bytes) => whole.extend_from_slice(bytes),
                None => return error(400, "InvalidPart"),
            }
            last = number;
        }
        if last as usize != upload.parts.len() || upload.key != key {
            return error(400, "InvalidPart");
        }
        let object = Object { bytes: whole.into(), written: self.now() };
        self.objects.insert(key.into(), object);
        self.uploads.remove(id);
        plain(200, "<Result><ETag>x</ETag></Result>")
    }

    fn list(&self, query: &BTreeMap<String, String>) -> Answer {
        assert_eq!(query["list-type"], "2");
        let limit: usize = query["max-keys"].parse().unwrap();
        let after = query.get("continuation-token").or(query.get("start-after")).cloned().unwrap_or_default();
        let mut keys = self
            .objects
            .iter()
            .filter(|(key, _)| key.starts_with(&query["prefix"]) && **key > after)
            .peekable();
        let mut body = String::from("<ListBucketResult xmlns=\"x\">");
        let mut last = "";
        for (key, object) in keys.by_ref().take(limit) {
            let (length, written) = (object.bytes.len(), iso(object.written));
            body += &format!(
                "<Contents><Key>{key}</Key><LastModified>{written}</LastModified><ETag>x</ETag><Size>{length}</Size></Contents>"
            );
            last = key;
        }
        let more = keys.peek().is_some();
        body += &format!("<IsTruncated>{more}</IsTruncated>");
        if more {
            body += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
        }
        plain(200, body + "</ListBucketResult>")
    }

    /// Two to a page.
    fn list_uploads(&self, query: &BTreeMap<String, String>) -> Answer {
        let marker = query.get("key-marker").zip(query.get("upload-id-marker"));
        let mut all: Vec<_> =
            self.uploads.iter().map(|(id, upload)| ((&upload.key, id), upload.begun)).collect();
        all.sort_unstable();
        all.retain(|(at, _)| at.0.starts_with(&query["prefix"]) && marker.is_none_or(|marker| *at > marker));
        let mut body = String::from("<ListMultipartUploadsResult>");
        for ((key, id), begun) in all.iter().take(2) {
            let (id, begun) = (id.replace('&', "&amp;"), iso(*begun));
            body += &format!(
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{begun}</Initiated></Upload>"
            );
        }
        if let (true, Some(((key, id), _))) = (all.len() > 2, all.get(1)) {
            let id = id.replace('&', "&amp;");
            body +=
                &format!("<NextKeyMarker>{key}</NextKeyMarker><NextUploadIdMarker>{id}</NextUploadIdMarker>");
        }
        body += &format!("<IsTruncated>{}</IsTruncated>", all.len() > 2);
        plain(StatusCode::OK.as_u16(), body + "</ListMultipartUploadsResult>")
    }
}
