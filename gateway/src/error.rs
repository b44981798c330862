//! Why a gateway does not start, or stops.

use ashlar_identity::TlsError;
use ashlar_identity::web::WebError;
use ashlar_store::blobs::BlobError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A gateway that cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Somebody else listens there.
    #[error(
        "port {} is in use on {}: stop the process that listens there, or choose another port with `listen`",
        address.port(),
        address.ip()
    )]
    PortInUse {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The address cannot be listened on for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The model's text files (tokenizer, templates) cannot be used.
    #[error("cannot load the tokenizer of {}: {reason}", model_dir.display())]
    Model {
        /// The model's directory.
        model_dir: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Its identity cannot be used.
    #[error("cannot use `identity`: {0}")]
    Identity(#[from] TlsError),
    /// The place of files cannot be used.
    #[error("cannot open `blobs`: {0}")]
    Blobs(#[from] BlobError),
    /// Whoever is in between would read everything.
    #[error(
        "{address} can be reached from other machines, and keys and prompts would go there in the clear: set `tls_certificate` and `tls_key` \
         (`ashlar certs` makes them), listen on 127.0.0.1, or, where something in front encrypts, set plain_http = true"
    )]
    InTheClear {
        /// The address.
        address: SocketAddr,
    },
    /// Whoever reaches it could do everything.
    #[error(
        "{address} can be reached from other machines, and `keys_required` is false, so that anybody there could steer the cluster: leave \
         it out, or listen on 127.0.0.1"
    )]
    WithoutKeys {
        /// The address.
        address: SocketAddr,
    },
    /// A certificate without its key, or the other way round.
    #[error("`tls_certificate` and `tls_key` belong together: set both")]
    HalfOfTls,
    /// Its certificate cannot be used.
    #[error("cannot speak HTTPS: {0}")]
    Web(#[from] WebError),
    /// The audit log cannot be written.
    #[error("cannot open `audit_log` {}: {source}", path.display())]
    AuditLog {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The metrics recorder refused its buckets: a fault in this crate.
    #[error("cannot set up metrics: {0}")]
    Metrics(String),
}
