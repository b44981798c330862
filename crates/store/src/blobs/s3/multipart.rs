//! Objects of unknown length: parts to `incoming/`, then a copy within the service to the name that the digest gives.

use super::client::{Client, Reply, Request, not_understood};
use super::xml;
use crate::blobs::backend::{BlobFuture, Incoming, Key};
use crate::blobs::error::BlobError;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use std::fmt::Write;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Where objects lie whose names are not known yet.
pub(super) const FOLDER: &str = "incoming";
/// Parts on their way at a time, apart from the one that is being filled.
const PARTS_IN_FLIGHT: usize = 2;

/// An upload, which a service shows nobody before it is completed.
struct Upload {
    client: Arc<Client>,
    path: String,
    id: String,
    parts: JoinSet<Result<(u32, String), BlobError>>,
    done: Vec<(u32, String)>,
    next: u32,
    bytes: u64,
}

impl Upload {
    /// Asks for an upload. In a task of its own: a caller that gives up while the answer is on its way leaves nothing.
    async fn begin(client: Arc<Client>, path: String) -> Result<Upload, BlobError> {
        let (answer, begun) = oneshot::channel();
        tokio::spawn(async move {
            let begun = match Upload::request_id(&client, &path).await {
                Ok(id) => Ok(Upload {
                    client,
                    path,
                    id,
                    parts: JoinSet::new(),
                    done: Vec::new(),
                    next: 1,
                    bytes: 0,
                }),
                Err(error) => Err(error),
            };
            if let Err(Ok(unwanted)) = answer.send(begun) {
                let aborted = abort(&unwanted.client, &unwanted.path, &unwanted.id).await;
                let _ = aborted.map_err(|error| tracing::debug!(%error, "an upload stays"));
            }
        });
        begun.await.map_err(|_| BlobError::Unavailable("shutting down".into()))?
    }

    async fn request_id(client: &Client, path: &str) -> Result<String, BlobError> {
        let reply = client.call_existing(&Request::new(Method::POST, path).query("uploads", "")).await?;
        let id = xml::text(reply.text()?, "UploadId").filter(|id| !id.is_empty());
        id.ok_or_else(|| not_understood("the beginning of an upload"))
    }

    /// Sends a part, as soon as there are few on their way. `tag` finds the part's tag in the answer.
    async fn part(&mut self, request: Request, tag: fn(&Reply) -> Option<String>) -> Result<(), BlobError> {
        while self.parts.len() >= PARTS_IN_FLIGHT {
            self.join().await?;
        }
        let number = self.next;
        self.next += 1;
        let request = request.query("partNumber", &number.to_string()).query("uploadId", &self.id);
        let client = Arc::clone(&self.client);
        self.parts.spawn(async move {
            let reply = client.call_existing(&request).await?;
            tag(&reply).map(|tag| (number, tag)).ok_or_else(|| not_understood("the tag of a part"))
        });
        Ok(())
    }

    async fn join(&mut self) -> Result<(), BlobError> {
        match self.parts.join_next().await {
            Some(Ok(part)) => self.done.push(part?),
            Some(Err(_)) => return Err(BlobError::Unavailable("shutting down".into())),
            None => {}
        }
        Ok(())
    }

    /// Makes one object of the parts.
    async fn complete(&mut self) -> Result<(), BlobError> {
        while !self.parts.is_empty() {
            self.join().await?;
        }
        self.done.sort_unstable();
        let mut body =
            String::from("<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
        for (number, tag) in &self.done {
            let tag = xml::escape(tag);
            let _ = write!(body, "<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>");
        }
        body.push_str("</CompleteMultipartUpload>");
        let request =
            Request::new(Method::POST, &self.path).query("uploadId", &self.id).body(Bytes::from(body));
        let reply = self.client.call(&request).await?;
        if reply.status == StatusCode::NOT_FOUND {
            // Completed by an earlier attempt whose answer was lost, if the object is there.
            let found = self.client.call(&Request::new(Method::HEAD, &self.path)).await?;
            if found.status == StatusCode::NOT_FOUND || found.length() != Some(self.bytes) {
                let text = format!("the service has lost the upload of {}", self.path);
                return Err(BlobError::Unavailable(text));
            }
        }
        Ok(())
    }
}

/// Ends an upload; one that is gone already is no error.
pub(super) async fn abort(client: &Client, path: &str, id: &str) -> Result<(), BlobError> {
    client.call(&Request::new(Method::DELETE, path).query("uploadId", id)).await.map(drop)
}

/// How far it got, and so what has to be removed if it goes no further.
enum State {
    Uploading(Upload),
    /// The object in `incoming/` is whole; perhaps copied by an upload of its own.
    Copying {
        client: Arc<Client>,
        path: String,
        copy: Option<Upload>,
    },
    Ended,
}

/// A blob on its way.
pub(super) struct Multipart {
    state: State,
    copy_bytes: u64,
}

impl Multipart {
    pub(super) async fn begin(client: Arc<Client>, copy_bytes: u64) -> Result<Multipart, BlobError> {
        let path = format!("{FOLDER}/{}", uuid::Uuid::new_v4().simple());
        let upload = Upload::begin(client, path).await?;
        Ok(Multipart { state: State::Uploading(upload), copy_bytes })
    }

    async fn finish(&mut self, key: Key) -> Result<(), BlobError> {
        let State::Uploading(upload) = &mut self.state else { return Err(ended()) };
        upload.complete().await?;
        let (client, from, bytes) = (Arc::clone(&upload.client), upload.path.clone(), upload.bytes);
        self.state = State::Copying { client: Arc::clone(&client), path: from.clone(), copy: None };
        let source = client.copy_source(&from);
        let target = key.path();
        if bytes <= self.copy_bytes {
            let request = Request::new(Method::PUT, &target).header("x-amz-copy-source", &source);
            client.call_existing(&request).await?;
        } else {
            let begun = Upload::begin(Arc::clone(&client), target.clone()).await?;
            let State::Copying { copy, .. } = &mut self.state else { return Err(ended()) };
            let copy = copy.insert(begun);
            let mut start = 0;
            while start < bytes {
                let end = (start + self.copy_bytes).min(bytes);
                let request = Request::new(Method::PUT, &target)
                    .header("x-amz-copy-source", &source)
                    .header("x-amz-copy-source-range", &format!("bytes={start}-{}", end - 1));
                copy.part(request, |reply| xml::text(reply.text().ok()?, "ETag")).await?;
                start = end;
            }
            copy.bytes = bytes;
            copy.complete().await?;
        }
        self.state = State::Ended;
        // The blob is there; what stays of its way is left to a clean-up.
        if let Err(error) = client.call(&Request::new(Method::DELETE, &from)).await {
            tracing::debug!(%error, "an uploaded object could not be removed after it was copied");
        }
        Ok(())
    }
}

fn ended() -> BlobError {
    BlobError::Invalid("this write has ended: begin it again".into())
}

impl Incoming for Multipart {
    fn append(&mut self, block: Bytes) -> BlobFuture<'_, ()> {
        Box::pin(async move {
            let State::Uploading(upload) = &mut self.state else { return Err(ended()) };
            upload.bytes += block.len() as u64;
            let request = Request::new(Method::PUT, &upload.path).body(block);
            upload.part(request, |reply| reply.header("etag").map(Into::into)).await
        })
    }

    fn commit(mut self: Box<Self>, key: Key) -> BlobFuture<'static, ()> {
        Box::pin(async move { self.finish(key).await })
    }
}

impl Drop for Multipart {
    /// Removes what an unfinished write leaves, as far as it can; a clean-up does the rest.
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let give_up = |upload: &mut Upload| {
            upload.parts.abort_all();
            let (client, path, id) = (Arc::clone(&upload.client), upload.path.clone(), upload.id.clone());
            async move {
                abort(&client, &path, &id).await.map_err(|error| tracing::debug!(%error, "an upload stays"))
            }
        };
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Uploading(mut upload) => {
                runtime.spawn(give_up(&mut upload));
            }
            State::Copying { client, path, mut copy } => {
                let copy = copy.as_mut().map(give_up);
                runtime.spawn(async move {
                    if let Some(abort) = copy {
                        let _ = abort.await;
                    }
                    let _ = client.call(&Request::new(Method::DELETE, &path)).await;
                });
            }
            State::Ended => {}
        }
    }
}
