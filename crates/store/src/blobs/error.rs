//! What can go wrong with blobs.

use ashlar_vocabulary::BlobId;

/// An error of the blob store. No message carries bytes of a blob or a credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlobError {
    /// The place cannot be reached, or did not answer in time. Try again; a write may have happened, and may be repeated.
    #[error("the blob store is unavailable ({0}): try again, and check that it runs and is reachable")]
    Unavailable(String),
    /// Nothing is stored under this name.
    #[error("blob {0} is not stored here: upload it again, or check the store's address")]
    NotFound(BlobId),
    /// The stored bytes are not those of the name.
    #[error("blob {id} is damaged ({reason}): upload it again, which replaces the damaged copy")]
    Corrupt {
        /// Which blob.
        id: BlobId,
        /// What was found.
        reason: String,
    },
    /// No room is left.
    #[error("no room for the blob in {place}: free some space there or raise its quota, then try again")]
    Full {
        /// The directory or bucket.
        place: String,
    },
    /// The disk refuses for another reason than room.
    #[error("blob store {place}: {reason}: check the disk and who may write there")]
    Disk {
        /// The directory or file.
        place: String,
        /// The system's words.
        reason: String,
    },
    /// The service refuses the credentials or the request.
    #[error("the blob service refuses {what} ({code}): check the access key, its rights and the bucket")]
    Refused {
        /// What was wanted.
        what: String,
        /// The service's name for the reason.
        code: String,
    },
    /// More than the limits allow.
    #[error("{what} is {size} bytes, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// How large it is, or at least is.
        size: u64,
        /// How large it may be.
        limit: u64,
    },
    /// The blob is no manifest, or one that cannot be used.
    #[error("blob {id} is no usable manifest: {reason}")]
    Manifest {
        /// Which blob.
        id: BlobId,
        /// What is wrong with it.
        reason: String,
    },
    /// The caller's argument is outside the limits.
    #[error("{0}")]
    Invalid(String),
    /// The address does not name a blob store.
    #[error(
        "{0}: write a directory, file:///DIRECTORY or s3://BUCKET/PREFIX?endpoint=https://HOST:PORT&region=NAME"
    )]
    Address(String),
}

impl BlobError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, BlobError::Unavailable(_))
    }

    /// Whether the cause is room: an upload is then answered with 507.
    pub fn is_full(&self) -> bool {
        matches!(self, BlobError::Full { .. })
    }
}
