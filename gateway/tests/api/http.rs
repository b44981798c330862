//! A plain HTTP client that shows everything, and can walk away.

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Nothing that a test asks for takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Http {
    pub(crate) address: SocketAddr,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Http {
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path), Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_bytes(path, body.to_string().into_bytes()).await
    }

    pub(crate) async fn post_bytes(&self, path: &str, body: Vec<u8>) -> Answer {
        self.send(Request::post(path), body).await
    }

    pub(crate) async fn send(&self, request: hyper::http::request::Builder, body: Vec<u8>) -> Answer {
        let response = self.begin(request, body).await;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = tokio::time::timeout(PATIENCE, response.into_body().collect()).await.unwrap();
        Answer { status, headers, body: body.unwrap().to_bytes().to_vec() }
    }

    /// Sends a request and gives the response as soon as its head is there.
    pub(crate) async fn begin(
        &self,
        request: hyper::http::request::Builder,
        body: Vec<u8>,
    ) -> Response<Incoming> {
        let socket = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        tokio::spawn(connection);
        let named = request.headers_ref().is_some_and(|headers| headers.contains_key("content-type"));
        let request = if named { request } else { request.header("content-type", "application/json") };
        let request = request.header("host", "test").body(Full::new(bytes_of(body))).unwrap();
        tokio::time::timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap()
    }

    /// POST of a multipart form.
    pub(crate) async fn form(&self, path: &str, parts: &[Part<'_>]) -> Answer {
        let (content_type, body) = form(parts);
        self.send(Request::post(path).header("content-type", content_type), body).await
    }

    /// Starts a stream of a GET.
    pub(crate) async fn follow(&self, path: &str) -> EventStream {
        let response = self.begin(Request::get(path), Vec::new()).await;
        assert_eq!(response.status(), 200);
        EventStream { body: response.into_body(), buffer: String::new() }
    }

    /// Starts a stream.
    pub(crate) async fn stream(&self, path: &str, body: Value) -> EventStream {
        let response = self.begin(Request::post(path), body.to_string().into_bytes()).await;
        assert_eq!(response.status(), 200);
        EventStream { body: response.into_body(), buffer: String::new() }
    }

    /// Sends bytes as they are and gives all that comes back.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> String {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// A part of a form: its name, the name of its file, its content.
pub(crate) type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);

/// A multipart body and its content type.
pub(crate) fn form(parts: &[Part<'_>]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (name, file, content) in parts {
        let file = file.map_or(String::new(), |file| format!("; filename=\"{file}\""));
        let head = format!("--cut\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--cut--\r\n");
    ("multipart/form-data; boundary=cut".to_owned(), body)
}

fn bytes_of(body: Vec<u8>) -> hyper::body::Bytes {
    hyper::body::Bytes::from(body)
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The events of a whole stream, which must end with `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut events: Vec<&str> =
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// A stream that is read event by event; dropping it closes the connection.
pub(crate) struct EventStream {
    body: Incoming,
    buffer: String,
}

impl EventStream {
    /// The next event or comment as it stands; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let event = event.to_owned();
                self.buffer = rest.to_owned();
                return Some(event);
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.unwrap()?.ok()?;
            self.buffer.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    }

    pub(crate) async fn rest(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}
