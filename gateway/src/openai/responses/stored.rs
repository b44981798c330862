//! What is stored of a response: its request, and its answer with all events.

use super::request::{Prepared, StoredRequest, own_items};
use crate::app::App;
use crate::openai::error::ApiError;
use ashlar_protocol::responses::ResponseRecord;
use ashlar_store::blobs::{BlobError, Blobs};
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use serde_json::Value;
use std::sync::Arc;

/// Most bytes of a stored request or answer that are read.
const STORED_BYTES_MAX: u64 = 256 << 20;
/// What ends an event.
const FRAME_END: &[u8] = b"\n\n";

/// An answer as it is stored: the final object in one line, then every event as it was sent.
pub(super) struct StoredAnswer {
    pub(super) object: Value,
    pub(super) frames: Vec<Bytes>,
}

pub(super) fn answer_bytes(object: &Value, frames: &[Bytes]) -> Vec<u8> {
    let mut bytes = object.to_string().into_bytes();
    bytes.push(b'\n');
    frames.iter().for_each(|frame| bytes.extend_from_slice(frame));
    bytes
}

impl StoredAnswer {
    fn parse(bytes: &Bytes) -> Option<StoredAnswer> {
        let line = bytes.iter().position(|byte| *byte == b'\n')?;
        let object = serde_json::from_slice(&bytes[..line]).ok()?;
        let (mut frames, mut rest) = (Vec::new(), bytes.slice(line + 1..));
        while let Some(end) = rest.windows(FRAME_END.len()).position(|window| window == FRAME_END) {
            frames.push(rest.split_to(end + FRAME_END.len()));
        }
        rest.is_empty().then_some(StoredAnswer { object, frames })
    }
}

async fn read(blobs: &Blobs, id: BlobId) -> Result<Bytes, ApiError> {
    let mut reader = blobs.get(id).await?;
    if reader.bytes() > STORED_BYTES_MAX {
        return Err(ApiError::internal("what is stored of this response is too large to be read"));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await.map_err(broken)? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.into())
}

fn broken(error: BlobError) -> ApiError {
    tracing::error!(%error, "what is stored of a response cannot be read");
    error.into()
}

fn unreadable() -> ApiError {
    ApiError::internal("what is stored of this response cannot be understood: it is of another release")
}

/// Writes a request; where it is.
pub(super) async fn write_request(app: &App, request: &StoredRequest) -> Result<BlobId, ApiError> {
    let blobs =
        app.responses.blobs().ok_or_else(|| ApiError::not_implemented("nothing can be stored here"))?;
    let bytes = serde_json::to_vec(request).map_err(|_| unreadable())?;
    Ok(blobs.put(&bytes).await?.id)
}

/// A response's request as it was stored.
pub(super) async fn request(app: &App, record: &ResponseRecord) -> Result<StoredRequest, ApiError> {
    let blobs = app.responses.blobs().ok_or_else(|| ApiError::not_implemented("nothing is stored here"))?;
    serde_json::from_slice(&read(blobs, record.request).await?).map_err(|_| unreadable())
}

/// The same with all that follows from it.
pub(super) async fn prepared(app: &Arc<App>, record: &ResponseRecord) -> Result<Prepared, ApiError> {
    let stored = request(app, record).await?;
    let worker = app.clone();
    app.work(move || Prepared::new(stored, &worker)).await
}

/// A response's answer, where a gateway has stored one.
pub(super) async fn answer(app: &App, record: &ResponseRecord) -> Result<Option<StoredAnswer>, ApiError> {
    let Some(id) = record.outcome.and_then(|outcome| outcome.answer) else { return Ok(None) };
    let blobs = app.responses.blobs().ok_or_else(|| ApiError::not_implemented("nothing is stored here"))?;
    StoredAnswer::parse(&read(blobs, id).await?).map(Some).ok_or_else(unreadable)
}

/// All items of the conversation up to the end of a response.
pub(super) async fn conversation(app: &App, record: &ResponseRecord) -> Result<Vec<Value>, ApiError> {
    let StoredRequest { prior, body, .. } = request(app, record).await?;
    let mut items = prior;
    items.append(&mut own_items(&body)?);
    let output = answer(app, record).await?.and_then(|answer| answer.object["output"].as_array().cloned());
    items.extend(output.into_iter().flatten());
    Ok(items)
}
