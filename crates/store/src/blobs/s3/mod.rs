//! Blobs in a bucket of an S3-compatible service.
//!
//! Layout: [`address`] (which bucket), [`credentials`], [`sign`] (signature version 4), [`client`] (requests, repeated where
//! that may help), [`multipart`] (objects of unknown length), [`source`] (reading, resumed where it is cut), [`xml`] and
//! [`time`] (the little that answers need). Objects have the paths that they have in a directory, below the prefix.
//!
//! Every body is signed, so what reaches the service is what was sent. A blob of one part goes straight to its name; a
//! longer one, whose name is known only at its end, goes to `incoming/` and is copied within the service.

mod address;
mod client;
mod credentials;
mod multipart;
mod sign;
mod source;
mod time;
mod xml;

pub use address::S3Address;
pub use credentials::Credentials;

use super::backend::{Backend, BlobFuture, Incoming, Key, Kind, Listed, Opened};
use super::error::BlobError;
use super::store::BlobOptions;
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use client::{Client, Reply, Request};
use hyper::{Method, StatusCode};
use multipart::Multipart;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Most parts that a service accepts for one object.
const PARTS_MAX: u64 = 10_000;

/// A bucket, or the part of it below a prefix.
pub(super) struct S3 {
    client: Arc<Client>,
    part_bytes: usize,
    copy_bytes: u64,
}

impl S3 {
    pub(super) fn new(
        address: &S3Address,
        credentials: Credentials,
        options: &BlobOptions,
    ) -> Result<S3, BlobError> {
        let client = Client::new(address, credentials, options)?;
        Ok(S3 { client: Arc::new(client), part_bytes: options.part_bytes, copy_bytes: options.copy_bytes })
    }

    /// What is known of an object without reading it.
    async fn head(&self, key: Key) -> Result<Option<Reply>, BlobError> {
        let reply = self.client.call(&Request::new(Method::HEAD, &key.path())).await?;
        Ok(if reply.status == StatusCode::NOT_FOUND { None } else { Some(reply) })
    }

    /// One page of objects under a folder: their paths below the prefix, their sizes and ages.
    async fn page(
        &self,
        folder: &str,
        after: Option<String>,
        token: Option<String>,
        limit: usize,
    ) -> Result<ObjectPage, BlobError> {
        let mut request = Request::bucket(Method::GET)
            .query("list-type", "2")
            .query("prefix", &self.client.full(&format!("{folder}/")))
            .query("max-keys", &limit.to_string());
        if let Some(token) = &token {
            request = request.query("continuation-token", token);
        } else if let Some(after) = &after {
            request = request.query("start-after", &self.client.full(after));
        }
        let reply = self.client.call_existing(&request).await?;
        let (now, text) = (reply.now(), reply.text()?);
        let mut objects = Vec::new();
        for block in xml::blocks(text, "Contents") {
            let read = || {
                let key = xml::text(block, "Key")?;
                let bytes = xml::text(block, "Size")?.parse().ok()?;
                let written = time::parse(&xml::text(block, "LastModified")?)?;
                let age = now.duration_since(written).unwrap_or(Duration::ZERO);
                Some((self.client.relative(&key)?, bytes, age))
            };
            objects.push(read().ok_or_else(|| client::not_understood("a list of objects"))?);
        }
        let more = xml::text(text, "IsTruncated").as_deref() == Some("true");
        let next = if more { xml::text(text, "NextContinuationToken") } else { None };
        Ok(ObjectPage { objects, next })
    }

    async fn list_kind(
        &self,
        kind: Kind,
        after: Option<BlobId>,
        limit: usize,
    ) -> Result<(Vec<Listed>, bool), BlobError> {
        let after = after.map(|id| Key { kind, id }.path());
        let mut token = None;
        loop {
            let page = self.page(kind.folder(), after.clone(), token, limit).await?;
            // What is not named like a blob is not ours and stays.
            let ours = page.objects.iter().filter_map(|(path, bytes, age)| {
                let id = BlobId::from_hex(path.rsplit('/').next()?).ok()?;
                let expected = Key { kind, id }.path();
                (expected == *path).then_some(Listed { id, bytes: *bytes, age: *age })
            });
            let found: Vec<Listed> = ours.collect();
            if !found.is_empty() || page.next.is_none() {
                return Ok((found, page.next.is_some()));
            }
            token = page.next;
        }
    }

    /// Ends uploads that were begun long ago, wherever they lead.
    async fn abort_old_uploads(&self, age: Duration) -> Result<u64, BlobError> {
        let mut aborted = 0;
        let mut marker: Option<(String, String)> = None;
        loop {
            let mut request =
                Request::bucket(Method::GET).query("uploads", "").query("prefix", &self.client.full(""));
            if let Some((key, upload)) = &marker {
                request = request.query("key-marker", key).query("upload-id-marker", upload);
            }
            let reply = self.client.call_existing(&request).await?;
            let (now, text) = (reply.now(), reply.text()?);
            for block in xml::blocks(text, "Upload") {
                let read = || {
                    let path = self.client.relative(&xml::text(block, "Key")?)?;
                    let begun = time::parse(&xml::text(block, "Initiated")?)?;
                    Some((path, xml::text(block, "UploadId")?, begun))
                };
                let (path, upload, begun) =
                    read().ok_or_else(|| client::not_understood("a list of uploads"))?;
                if now.duration_since(begun).unwrap_or(Duration::ZERO) >= age {
                    multipart::abort(&self.client, &path, &upload).await?;
                    aborted += 1;
                }
            }
            let truncated = xml::text(text, "IsTruncated").as_deref() == Some("true");
            let next = (xml::text(text, "NextKeyMarker"), xml::text(text, "NextUploadIdMarker"));
            marker = match next {
                (Some(key), Some(upload)) if truncated => Some((key, upload)),
                _ => return Ok(aborted),
            };
        }
    }

    async fn delete_old_incoming(&self, age: Duration) -> Result<u64, BlobError> {
        let (mut removed, mut token) = (0, None);
        loop {
            let page = self.page(multipart::FOLDER, None, token, super::PAGE_BLOBS_MAX).await?;
            for (path, _, object_age) in page.objects {
                if object_age >= age {
                    self.client.call(&Request::new(Method::DELETE, &path)).await?;
                    removed += 1;
                }
            }
            token = page.next;
            if token.is_none() {
                return Ok(removed);
            }
        }
    }
}

struct ObjectPage {
    objects: Vec<(String, u64, Duration)>,
    next: Option<String>,
}

impl Backend for S3 {
    fn block_bytes(&self) -> usize {
        self.part_bytes
    }

    fn object_bytes_max(&self) -> u64 {
        (self.part_bytes as u64).min(self.copy_bytes).saturating_mul(PARTS_MAX)
    }

    fn put(&self, key: Key, bytes: Bytes) -> BlobFuture<'_, ()> {
        Box::pin(async move {
            let request = Request::new(Method::PUT, &key.path()).body(bytes);
            self.client.call_existing(&request).await.map(drop)
        })
    }

    fn begin(&self) -> BlobFuture<'_, Box<dyn Incoming>> {
        Box::pin(async move {
            let multipart = Multipart::begin(Arc::clone(&self.client), self.copy_bytes).await?;
            Ok(Box::new(multipart) as Box<dyn Incoming>)
        })
    }

    fn read(&self, key: Key, range: Option<Range<u64>>) -> BlobFuture<'_, Option<Opened>> {
        Box::pin(source::open(Arc::clone(&self.client), key.path(), range))
    }

    fn size(&self, key: Key) -> BlobFuture<'_, Option<u64>> {
        Box::pin(async move {
            let Some(reply) = self.head(key).await? else { return Ok(None) };
            reply.length().map(Some).ok_or_else(|| client::not_understood("an object's length"))
        })
    }

    fn delete(&self, key: Key) -> BlobFuture<'_, bool> {
        Box::pin(async move {
            // The service answers a deletion the same way whether there was something.
            let existed = self.head(key).await?.is_some();
            if existed {
                self.client.call(&Request::new(Method::DELETE, &key.path())).await?;
            }
            Ok(existed)
        })
    }

    fn delete_older(&self, key: Key, age: Duration) -> BlobFuture<'_, bool> {
        Box::pin(async move {
            let Some(reply) = self.head(key).await? else { return Ok(false) };
            let written = reply.header("last-modified").and_then(|text| httpdate::parse_http_date(text).ok());
            let written: SystemTime = written.ok_or_else(|| client::not_understood("an object's age"))?;
            if reply.now().duration_since(written).unwrap_or(Duration::ZERO) < age {
                return Ok(false);
            }
            self.client.call(&Request::new(Method::DELETE, &key.path())).await?;
            Ok(true)
        })
    }

    fn list(&self, kind: Kind, after: Option<BlobId>, limit: usize) -> BlobFuture<'_, (Vec<Listed>, bool)> {
        Box::pin(self.list_kind(kind, after, limit))
    }

    fn clean(&self, age: Duration) -> BlobFuture<'_, u64> {
        Box::pin(async move { Ok(self.abort_old_uploads(age).await? + self.delete_old_incoming(age).await?) })
    }
}
