//! Who is who in a cluster, and how its processes speak so that nobody else can listen or take part.
//!
//! Layout: [`api_key`] (what clients show), [`name`] (roles and names), [`authority`] (the cluster's own certificate authority), [`credentials`] (what a process
//! keeps: its key, its certificate, the authority's), [`token`] and [`ledger`] (what lets a machine enrol, once),
//! [`request`] (what a machine that enrols signs), [`tls`] (both sides of a handshake), [`transport`] (plain, or encrypted: what
//! every role uses), [`stream`] (asynchronous connections), [`socket`] (blocking ones, for data between nodes); apart from all that [`web`] (HTTPS for clients from outside).
//!
//! **Invariants:** TLS 1.3 only, and both sides show a certificate of the same authority, which is used for nothing else. A
//! certificate names one role and one name; whoever connects or accepts says which role it expects. The authority's key never
//! leaves its directory, a node's key never leaves the node. A token is stored only as a hash, and a certificate for it is handed
//! out only after its use is durable. Plain connections take the way that they took before: no copy, no lock. The wall clock
//! decides only whether tokens and certificates are valid, never a time-out.
#![forbid(unsafe_code)]

pub mod api_key;
pub mod authority;
pub mod credentials;
pub mod ledger;
pub mod name;
pub mod request;
pub mod socket;
pub mod stream;
pub mod tls;
pub mod token;
pub mod transport;
pub mod web;

mod bounded;
mod files;
mod records;

pub use api_key::{ApiKey, ApiKeyError, fingerprint};
pub use authority::Authority;
pub use credentials::{Credentials, Fingerprint, IdentityError};
pub use ledger::{Claim, Ledger, LedgerError};
pub use name::{Identity, NameError, Role};
pub use request::{CertificateRequest, KeyPair};
pub use socket::Socket;
pub use stream::Stream;
pub use tls::{Tls, TlsError};
pub use token::{Token, TokenError};
pub use transport::{ListenError, Transport};
