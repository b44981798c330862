//! Records of `/v1/responses` that outlive the connection over which they were asked for.
//!
//! A stored response is its request: whoever computes it says the same tokens, and a gateway makes the same events of them. So the
//! request alone has to be durable before the answer is, and any gateway can take a response up where another has left it.

use ashlar_vocabulary::{BlobId, KeyId, RequestId, Tenant};
use serde::{Deserialize, Serialize};

/// What a gateway wants of the records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResponseCall {
    /// Remember that one has begun, or how it has ended. What has ended stays as it is.
    Put(ResponseRecord),
    /// Read one.
    Get(RequestId),
    /// End one that is in progress. One that has ended stays as it is.
    Cancel(RequestId),
    /// Forget one; one that is in progress ends.
    Delete(RequestId),
}

/// A stored response, as far as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseRecord {
    /// Its name, which is also the name of its request: it has one choice, number 0.
    pub id: RequestId,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Whether it goes on when nobody listens.
    pub background: bool,
    /// The request with all that was decided when it came, as the gateway writes it.
    pub request: BlobId,
    /// How it ended; `None` while it is in progress.
    pub outcome: Option<ResponseOutcome>,
    /// Whose it is; `None` is nobody's.
    #[serde(default)]
    pub owner: Option<Tenant>,
    /// On whose account it is computed.
    #[serde(default)]
    pub key: Option<KeyId>,
}

/// How a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseOutcome {
    /// In one word.
    pub status: ResponseStatus,
    /// The answer and its events, as the gateway writes them; `None` where no gateway was there to do so.
    pub answer: Option<BlobId>,
}

/// OpenAI's words for the end of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResponseStatus {
    /// The model has ended its answer.
    Completed,
    /// The answer was cut off.
    Incomplete,
    /// It could not be computed.
    Failed,
    /// By its owner, or because nobody came back for it in time.
    Cancelled,
}
