//! A machine that wants to join, and the endpoint that hands out certificates: one request and one answer, over a connection on which
//! only the endpoint has shown who it is.

use ashlar_identity::CertificateRequest;
use ashlar_identity::token::SECRET_BYTES;
use ashlar_vocabulary::{ModelDigest, Precision};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest request and answer: the request comes from anybody.
pub const ENROLMENT_BYTES_MAX: usize = 16 << 10;

/// What a machine shows and wants.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentRequest {
    /// The secret of its token; `None` for a node that has enrolled, whose key says enough: it wants to know where the cluster is now.
    pub secret: Option<[u8; SECRET_BYTES]>,
    /// What its certificate shall say.
    pub request: CertificateRequest,
}

impl fmt::Debug for EnrolmentRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolmentRequest").field("request", &self.request).finish_non_exhaustive()
    }
}

/// What comes of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EnrolmentAnswer {
    /// It is a node of the cluster now.
    Welcome(Box<Welcome>),
    /// It is not; why, and what to do.
    Refused(String),
}

/// What a new node needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The certificate of the cluster's authority.
    pub authority: Vec<u8>,
    /// The node's certificate.
    pub certificate: Vec<u8>,
    /// Where the cluster is, and what it serves.
    pub cluster: ClusterFacts,
}

/// Where a cluster is, and what it serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// Where schedulers listen for nodes, `host:port` each.
    pub schedulers: Vec<String>,
    /// The model.
    pub model: ModelSource,
    /// Its digest in that precision.
    pub model_digest: ModelDigest,
    /// Where uploaded files, checkpoints and adapters are, if every machine can reach that.
    pub blobs: Option<String>,
    /// In which precision it is served.
    pub precision: Precision,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// The demo model, which every release carries.
    Demo,
    /// A hub.
    Hub(String),
    /// This directory or file on the cluster's first machine.
    Directory(String),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::frame;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = frame::decode::<EnrolmentRequest>(&bytes);
            let _ = frame::decode::<EnrolmentAnswer>(&bytes);
        }
    }

    #[test]
    fn a_secret_stays_out_of_messages() {
        let key = ashlar_identity::KeyPair::generate().unwrap();
        let request = CertificateRequest::sign("a", &key, ashlar_identity::Fingerprint([0; 32])).unwrap();
        let text = format!("{:?}", EnrolmentRequest { secret: Some([77; SECRET_BYTES]), request });
        assert!(!text.contains("77, 77"), "{text}");
    }
}
