//! OpenAI's files and fine-tuning jobs.
//!
//! Layout: `ids` (names of things), `lists` (pages), `upload` and `files`, `choices` (a job's request, read),
//! `jobs` (its endpoints), `objects` (jobs, events and checkpoints as a client sees them), `promotion` (what became of an adapter
//! that has to be better than what is served), `follow` (events as they come),
//! `download` (a blob as a body).

pub(crate) mod choices;
mod download;
pub(crate) mod files;
mod follow;
mod ids;
pub(crate) mod jobs;
pub(crate) mod lists;
mod objects;
mod promotion;
pub(crate) mod upload;

use super::error::ApiError;
use crate::app::App;
use crate::tuning::Tuning;
use ashlar_protocol::admin::AdminReply;
use ashlar_store::blobs::BlobError;

/// What fine-tuning needs, or why there is none.
fn tuning(app: &App) -> Result<&Tuning, ApiError> {
    app.tuning.as_ref().ok_or_else(|| {
        ApiError::not_implemented(
            "files and fine-tuning are not configured here: set `blobs` to a directory or an s3:// address in the \
             configuration of the gateway, the scheduler and every node",
        )
    })
}

/// A reply of another kind than the call's.
fn unexpected(reply: &AdminReply) -> ApiError {
    let kind = format!("{reply:?}").chars().take_while(|c| c.is_alphanumeric()).collect::<String>();
    tracing::error!(kind, "the scheduler answers a call with a reply of another kind");
    ApiError::internal("the scheduler gave an answer that makes no sense: are all roles of one release?")
}

impl From<BlobError> for ApiError {
    fn from(error: BlobError) -> ApiError {
        // Places and codes are the operator's business.
        tracing::warn!(%error, "the blob store refuses");
        match error {
            BlobError::Full { .. } => ApiError::insufficient_storage(
                "there is no room left for files: delete some, or ask the operator",
            ),
            BlobError::Unavailable(_) => {
                ApiError::unavailable("the file store does not answer: retry in a moment")
            }
            BlobError::NotFound(_) => ApiError::not_found(
                "the content of this file is gone: upload it again",
                "file_content_missing",
            ),
            _ => ApiError::internal("the file store failed: ask the operator, whose log says why"),
        }
    }
}
