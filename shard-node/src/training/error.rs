//! Why a session cannot go on, and whether another one may.

use super::alarm::Ended;
use ashlar_dataset::DatasetError;
use ashlar_model::CollectiveError;
use ashlar_model::stage::{ForwardError, LoadError};
use ashlar_model::trained::MissingTensor;
use ashlar_protocol::frame::FrameError;
use ashlar_store::blobs::BlobError;
use ashlar_training::checkpoint::CheckpointError;
use std::io::ErrorKind;

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// It was ended from outside.
    #[error("the session ended: {0}")]
    Ended(String),
    /// A connection to another rank.
    #[error("lost {who}: {source}")]
    Lost {
        /// Which rank.
        who: &'static str,
        /// Why.
        source: FrameError,
    },
    /// A rank of the same stage.
    #[error(transparent)]
    Group(#[from] CollectiveError),
    /// Ranks that never came.
    #[error("other ranks of the session did not connect within {0} s")]
    Alone(u64),
    /// The scheduler and this rank are not at the same step.
    #[error("step {asked} was asked for, but this rank has the state after {committed} steps")]
    OutOfStep {
        /// The scheduler's.
        asked: u64,
        /// This rank's.
        committed: u64,
    },
    /// Something that another attempt would meet again.
    #[error("{0}")]
    Refused(String),
    /// The blob store.
    #[error("the blob store failed: {0}")]
    Blobs(#[from] BlobError),
    /// The local copy of the training data, or the system.
    #[error("cannot keep the training data: {0}")]
    Local(#[from] std::io::Error),
    /// The training data.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The state of an earlier session.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Weights that serving does not hold as training needs them.
    #[error("cannot load weights for training: {0}")]
    Weights(#[from] LoadError),
}

impl SessionError {
    /// Whether another attempt may succeed.
    pub(crate) fn may_retry(&self) -> bool {
        match self {
            SessionError::Checkpoint(CheckpointError::Read(_)) => true,
            SessionError::Refused(_) | SessionError::Checkpoint(_) | SessionError::Weights(_) => false,
            SessionError::Dataset(error) => matches!(error, DatasetError::Io(_)),
            SessionError::Blobs(error) => !matches!(
                error,
                BlobError::NotFound(_) | BlobError::Corrupt { .. } | BlobError::TooLarge { .. }
            ),
            _ => true,
        }
    }

    /// Whether there is no room left where samples, states and results are kept.
    pub(crate) fn is_no_room(&self) -> bool {
        match self {
            SessionError::Blobs(error) => error.is_full(),
            SessionError::Local(error) | SessionError::Dataset(DatasetError::Io(error)) => {
                matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// A failure to speak with `who`.
    pub(crate) fn lost(who: &'static str) -> impl Fn(FrameError) -> SessionError {
        move |source| SessionError::Lost { who, source }
    }
}

impl From<Ended> for SessionError {
    fn from(Ended(reason): Ended) -> SessionError {
        SessionError::Ended(reason)
    }
}

impl From<MissingTensor> for SessionError {
    fn from(error: MissingTensor) -> SessionError {
        SessionError::Refused(error.to_string())
    }
}

impl From<ForwardError> for SessionError {
    fn from(error: ForwardError) -> SessionError {
        match error {
            ForwardError::Collective(error) => error.into(),
            ForwardError::Stopped => SessionError::Ended("it was stopped".into()),
            other => SessionError::Refused(other.to_string()),
        }
    }
}
