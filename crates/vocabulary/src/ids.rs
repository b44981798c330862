//! Identifiers. Each is a newtype, so that a stage is never mistaken for a rank.

use crate::blob::BlobId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// The fencing token of a scheduler's lease: a rank obeys only the highest it has seen.
    LeaseTerm(u64)
);
number_id!(
    /// Raised by each re-layout of a replica; messages of an older revision are dropped.
    ReplicaRevision(u64)
);
number_id!(
    /// One scheduler step of one replica; consecutive within a revision, starting at 1.
    StepId(u64)
);
number_id!(
    /// One continuation (one choice of one request) inside the scheduler and the ranks.
    SequenceId(u64)
);
number_id!(
    /// A fine-tuning job's stay on a set of ranks; unique over all terms, as revisions are.
    SessionId(u64)
);
number_id!(
    /// A full set of stages.
    ReplicaId(u32)
);
number_id!(
    /// A pipeline stage within a replica, from 0.
    StageIndex(u32)
);
number_id!(
    /// A tensor-parallel rank within a stage, from 0.
    TensorRank(u32)
);
number_id!(
    /// A block of KV cache; the same number means the same tokens on every rank of a replica.
    BlockId(u32)
);

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// Names a node process; chosen by its configuration, stable over restarts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub String);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Names a client's request across all roles; unguessable, chosen by the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u128);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Names an adapter's bits: the blob of a manifest with its PEFT files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AdapterId(pub BlobId);

impl fmt::Display for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a fine-tuning job; unguessable, chosen by the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub u128);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Names an uploaded file; unguessable, chosen by the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId(pub u128);

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Names an API key; it is the part of the key that is no secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyId(pub u64);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for KeyId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<KeyId, ParseIntError> {
        u64::from_str_radix(text, 16).map(KeyId)
    }
}

/// Whose something is: files, jobs, stored responses and cached prefixes of one are not there for another. Several keys may be of
/// one tenant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tenant(pub String);

impl Tenant {
    /// Longest name, in bytes.
    pub const BYTES_MAX: usize = 64;

    /// Whether a tenant may be called this: letters, digits, `-`, `_` and `.`, at most [`BYTES_MAX`](Self::BYTES_MAX) of them.
    pub fn is_valid(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=Tenant::BYTES_MAX).contains(&self.0.len()) && self.0.bytes().all(plain)
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Digest of what determines a model's bits: weights, their format and the numeric version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelDigest(pub [u8; 32]);

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(8).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}

/// Version of the numeric contract; part of every model digest. Raised by any change of the order of operations.
pub const NUMERIC_VERSION: u32 = 2;
