//! A blob as the body of an answer.

use crate::openai::error::ApiError;
use ashlar_store::blobs::{BlobError, Blobs};
use ashlar_vocabulary::BlobId;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// Streams a blob. Its end arrives only where its digest is right; otherwise the connection breaks off.
pub(super) async fn download(blobs: &Blobs, blob: BlobId, name: &str) -> Result<Response, ApiError> {
    let reader = blobs.get(blob).await?;
    let bytes = reader.bytes();
    let frames = futures::stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(chunk)) => Some((Ok::<_, BlobError>(chunk), Some(reader))),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "a download is broken off");
                Some((Err(error), None))
            }
        }
    });
    let mut response = Body::from_stream(frames).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    // Whatever the file holds, a browser shall not take it for a page.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._- ".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}
