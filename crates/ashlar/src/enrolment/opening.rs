//! A cluster of `ashlar up` that other machines may join: its authority, an identity for each of its processes, and where they listen.

use super::endpoint::EnrolmentConfig;
use super::{JOIN_PORT, as_host, own_address};
use crate::port::ReservedPort;
use anyhow::{Context, Result};
use ashlar_identity::{Authority, Identity, Ledger, Role};
use ashlar_protocol::enrolment::ModelSource;
use ashlar_scheduler::ModelCard;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Below the state directory.
const AUTHORITY: &str = "ca";
const IDENTITIES: &str = "identities";

/// What makes a cluster one that can be joined.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Where machines join.
    pub(crate) port: ReservedPort,
    /// What other machines call this one.
    pub(crate) host: String,
    /// Of its processes.
    pub(crate) identities: Identities,
}

/// The cluster's authority, and who it has said the processes of this machine are.
#[derive(Debug)]
pub(crate) struct Identities {
    authority: Authority,
    state: PathBuf,
}

impl Identities {
    /// Makes the authority on first use.
    pub(crate) fn open(state: &Path) -> Result<Identities> {
        let authority = Authority::open_or_create(&state.join(AUTHORITY))?;
        Ok(Identities { authority, state: state.to_owned() })
    }

    /// Makes an identity for a process of this machine, anew at every start; where it is kept.
    pub(crate) fn make(&self, role: Role, name: &str) -> Result<PathBuf> {
        let identity = Identity::new(role, name)?;
        if role == Role::Node {
            Ledger::of(&self.state.join(AUTHORITY)).reserve(&identity)?;
        }
        let directory = self.state.join(IDENTITIES).join(name);
        self.authority.credentials(&identity)?.save(&directory)?;
        Ok(directory)
    }
}

impl Opening {
    /// At this address; makes the authority on first use.
    pub(crate) fn new(listen: SocketAddr, advertise: Option<&str>, state: &Path) -> Result<Opening> {
        let port = ReservedPort::at(listen).with_context(|| {
            format!("cannot listen on {listen}: choose another address with --join-listen")
        })?;
        let host = match advertise {
            Some(host) => host.to_owned(),
            None if listen.ip().is_unspecified() => as_host(own_address()),
            None => as_host(listen.ip()),
        };
        Ok(Opening { port, host, identities: Identities::open(state)? })
    }

    /// Where scheduler `number` listens for nodes: the same at every start, for machines that have joined remember it.
    pub(crate) fn scheduler_port(&self, number: usize) -> Result<ReservedPort> {
        let join = self.port.address();
        let port = u16::try_from(number + 1).ok().and_then(|above| join.port().checked_add(above));
        let address =
            SocketAddr::new(join.ip(), port.context("there is no port above: choose another --join-listen")?);
        ReservedPort::at(address).with_context(|| {
            format!(
                "cannot listen on {address}, where a scheduler would: choose another --join-listen than {join}, for example port \
                 {JOIN_PORT}"
            )
        })
    }

    /// Where a node of this machine listens for other nodes.
    pub(crate) fn any_port(&self) -> String {
        SocketAddr::new(self.port.address().ip(), 0).to_string()
    }

    /// The configuration of the endpoint, without blobs.
    pub(crate) fn enrolment(
        &self,
        schedulers: &[[ReservedPort; 2]],
        directory: &Path,
        model: Option<&str>,
        card: &ModelCard,
    ) -> Result<EnrolmentConfig> {
        let at = |port: u16| format!("{}:{port}", self.host);
        let model = match model {
            None => ModelSource::Demo,
            Some(model) if Path::new(model).exists() => {
                ModelSource::Directory(directory.to_string_lossy().into_owned())
            }
            Some(id) => ModelSource::Hub(id.to_owned()),
        };
        Ok(EnrolmentConfig {
            listen: self.port.address().to_string(),
            advertise: at(self.port.address().port()),
            authority: self.identities.state.join(AUTHORITY),
            identity: self.identities.make(Role::Enrolment, "enrolment")?,
            schedulers: schedulers.iter().map(|[nodes, _]| at(nodes.address().port())).collect(),
            blobs: None,
            model_digest: card.digest,
            model,
            precision: card.precision,
        })
    }
}

/// An address on which this machine listens, as its own processes reach it.
pub(crate) fn from_here(listening: SocketAddr) -> SocketAddr {
    match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, listening.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, listening.port()).into(),
        _ => listening,
    }
}
