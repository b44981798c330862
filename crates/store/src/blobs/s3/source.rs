//! Reading an object, resumed where it is cut.

use super::client::{Client, Reply, Request, not_understood};
use crate::blobs::backend::{BlobFuture, Opened, Source};
use crate::blobs::error::BlobError;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use std::ops::Range;
use std::sync::Arc;

/// Opens an object or a range of it, cut to its end.
pub(super) async fn open(
    client: Arc<Client>,
    path: String,
    range: Option<Range<u64>>,
) -> Result<Option<Opened>, BlobError> {
    // An empty range has no form in a request; it is answered by the length alone, as is one beyond the end.
    if range.as_ref().is_none_or(|range| range.start < range.end) {
        let (reply, body) = client.open(&get(&path, range.as_ref())).await?;
        if let Some(body) = body {
            let (rest, total) = extent(&reply, range.as_ref())?;
            let source = ObjectSource { client, path, rest, body: Some(body), failures: 0 };
            return Ok(Some(Opened { total, source: Box::new(source) }));
        }
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
    }
    let reply = client.call(&Request::new(Method::HEAD, &path)).await?;
    if reply.status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let total = reply.length().ok_or_else(|| not_understood("an object's length"))?;
    let source = ObjectSource { client, path, rest: total..total, body: None, failures: 0 };
    Ok(Some(Opened { total, source: Box::new(source) }))
}

fn get(path: &str, range: Option<&Range<u64>>) -> Request {
    let request = Request::new(Method::GET, path);
    match range {
        Some(range) => request.header("range", &format!("bytes={}-{}", range.start, range.end - 1)),
        None => request,
    }
}

/// What an answer holds of the object, and how long that is.
fn extent(reply: &Reply, asked: Option<&Range<u64>>) -> Result<(Range<u64>, u64), BlobError> {
    let wrong = || not_understood("an object's extent");
    let Some(asked) = asked else {
        let total = reply.length().ok_or_else(wrong)?;
        return Ok((0..total, total));
    };
    // A service that ignores ranges would answer with the whole, as 200.
    if reply.status != StatusCode::PARTIAL_CONTENT {
        return Err(wrong());
    }
    let told =
        reply.header("content-range").and_then(|text| text.strip_prefix("bytes ")).ok_or_else(wrong)?;
    let (span, total) = told.split_once('/').ok_or_else(wrong)?;
    let (start, last) = span.split_once('-').ok_or_else(wrong)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
    let (start, last, total) = (number(start)?, number(last)?, number(total)?);
    if start != asked.start || last >= total || last.checked_add(1) != Some(asked.end.min(total)) {
        return Err(wrong());
    }
    Ok((start..last + 1, total))
}

struct ObjectSource {
    client: Arc<Client>,
    path: String,
    /// What is still to come.
    rest: Range<u64>,
    body: Option<Incoming>,
    /// Since bytes came last.
    failures: u32,
}

impl ObjectSource {
    /// The next bytes of the body that is open; `None` if it ended or failed.
    async fn chunk(&mut self) -> Option<Bytes> {
        let body = self.body.as_mut()?;
        loop {
            let frame = tokio::time::timeout(self.client.timeout, body.frame()).await.ok()??.ok()?;
            match frame.into_data() {
                Ok(bytes) if !bytes.is_empty() => return Some(bytes),
                _ => {}
            }
        }
    }
}

impl Source for ObjectSource {
    fn next(&mut self) -> BlobFuture<'_, Option<Bytes>> {
        Box::pin(async move {
            while self.rest.start < self.rest.end {
                if let Some(chunk) = self.chunk().await {
                    self.failures = 0;
                    self.rest.start += chunk.len() as u64;
                    if self.rest.start > self.rest.end {
                        return Err(not_understood("an object's length"));
                    }
                    return Ok(Some(chunk));
                }
                self.body = None;
                self.failures += 1;
                if self.failures > self.client.attempts {
                    let at = self.rest.start;
                    return Err(BlobError::Unavailable(format!(
                        "reading {} is cut again and again at {at}",
                        self.path
                    )));
                }
                self.client.pause(self.failures).await;
                let (reply, body) = self.client.open(&get(&self.path, Some(&self.rest))).await?;
                let Some(body) = body else {
                    return Err(BlobError::Unavailable(format!("{} went while it was read", self.path)));
                };
                let (rest, _) = extent(&reply, Some(&self.rest))?;
                if rest != self.rest {
                    return Err(not_understood("an object's extent"));
                }
                self.body = Some(body);
            }
            Ok(None)
        })
    }
}
