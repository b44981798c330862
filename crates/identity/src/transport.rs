//! How a process's connections are made: in the clear on one machine, or encrypted and mutual.

use crate::credentials::Fingerprint;
use crate::name::{Identity, Role};
use crate::records::{self, Records};
use crate::socket::Socket;
use crate::stream::Stream;
use crate::tls::{self, Tls, TlsError};
use rustls::{ClientConnection, Connection, ServerConnection};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// An address that others could reach.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{address} can be reached from other machines, but this process has no identity, so anybody there could take part in the \
     cluster: let it join with `ashlar node --join`, set `identity` (docs/OPERATING.md, More machines), listen on 127.0.0.1, or, on a \
     network that only the cluster is on, set allow_plaintext = true"
)]
pub struct ListenError {
    /// The address.
    pub address: SocketAddr,
}

/// How connections to other roles are made; clones are the same.
#[derive(Debug, Clone, Default)]
pub enum Transport {
    /// In the clear.
    #[default]
    Plain,
    /// Encrypted, both sides with certificates of the cluster's authority.
    Encrypted(Tls),
}

impl Transport {
    /// With the identity that is kept in a directory, or in the clear without one.
    ///
    /// # Errors
    /// [`TlsError::Identity`].
    pub fn open(identity: Option<&Path>) -> Result<Transport, TlsError> {
        Ok(match identity {
            None => Transport::Plain,
            Some(directory) => Transport::Encrypted(Tls::open(directory)?),
        })
    }

    /// Who this process is; `None` in the clear.
    pub fn own(&self) -> Option<&Identity> {
        match self {
            Transport::Plain => None,
            Transport::Encrypted(tls) => Some(tls.own()),
        }
    }

    /// Refuses to listen in the clear where other machines could connect, unless that is `allowed`.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn check_listening(&self, address: SocketAddr, allowed: bool) -> Result<(), ListenError> {
        let exposed = matches!(self, Transport::Plain) && !address.ip().is_loopback();
        if exposed && !allowed { Err(ListenError { address }) } else { Ok(()) }
    }

    /// The client's side: only a process of the role `expected` is spoken to.
    ///
    /// # Errors
    /// [`TlsError`].
    pub async fn connect(&self, tcp: tokio::net::TcpStream, expected: Role) -> Result<Stream, TlsError> {
        let Transport::Encrypted(own) = self else { return Ok(Stream::Plain(tcp)) };
        let connected = TlsConnector::from(own.sides().client.clone()).connect(tls::server_name(), tcp).await;
        let stream = connected.map_err(TlsError::of_io)?;
        let peer = tls::expect(stream.get_ref().1.peer_certificates(), expected)?;
        Ok(Stream::Encrypted(Box::new(TlsStream::Client(stream)), Some(peer)))
    }

    /// The server's side: only a process of the role `expected` is listened to.
    ///
    /// # Errors
    /// [`TlsError`].
    pub async fn accept(&self, tcp: tokio::net::TcpStream, expected: Role) -> Result<Stream, TlsError> {
        let Transport::Encrypted(own) = self else { return Ok(Stream::Plain(tcp)) };
        let accepted = TlsAcceptor::from(own.sides().server.clone()).accept(tcp).await;
        let stream = accepted.map_err(TlsError::of_io)?;
        let peer = tls::expect(stream.get_ref().1.peer_certificates(), expected)?;
        Ok(Stream::Encrypted(Box::new(TlsStream::Server(stream)), Some(peer)))
    }

    /// [`Transport::connect`], blocking, for at most `limit`. Changes the read time-out.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn connect_blocking(
        &self,
        tcp: std::net::TcpStream,
        expected: Role,
        limit: Duration,
    ) -> Result<Socket, TlsError> {
        match self {
            Transport::Plain => Ok(tcp.into()),
            Transport::Encrypted(own) => {
                let connection = ClientConnection::new(own.sides().client.clone(), tls::server_name())?;
                complete(connection.into(), tcp, expected, limit)
            }
        }
    }

    /// [`Transport::accept`], blocking, for at most `limit`. Changes the read time-out.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn accept_blocking(
        &self,
        tcp: std::net::TcpStream,
        expected: Role,
        limit: Duration,
    ) -> Result<Socket, TlsError> {
        match self {
            Transport::Plain => Ok(tcp.into()),
            Transport::Encrypted(own) => {
                let connection = ServerConnection::new(own.sides().server.clone())?;
                complete(connection.into(), tcp, expected, limit)
            }
        }
    }
}

fn complete(
    mut connection: Connection,
    mut tcp: std::net::TcpStream,
    expected: Role,
    limit: Duration,
) -> Result<Socket, TlsError> {
    tcp.set_write_timeout(Some(limit))?;
    records::handshake(&mut connection, &mut tcp, Instant::now() + limit)?;
    tcp.set_write_timeout(None)?;
    let peer = tls::expect(connection.peer_certificates(), expected)?;
    Ok(Socket::encrypted(tcp, Records::new(connection)?, peer))
}

/// The enrolment endpoint's side of a connection: anybody is listened to.
///
/// # Errors
/// [`TlsError`].
pub async fn accept_anybody(tls: &Tls, tcp: tokio::net::TcpStream) -> Result<Stream, TlsError> {
    let stream =
        TlsAcceptor::from(tls.sides().enrolment.clone()).accept(tcp).await.map_err(TlsError::of_io)?;
    Ok(Stream::Encrypted(Box::new(TlsStream::Server(stream)), None))
}

/// The side of a machine that enrols: only the enrolment endpoint of the cluster with this fingerprint is spoken to, and nothing is
/// said before that is certain.
///
/// # Errors
/// [`TlsError`].
pub async fn connect_to_enrol(tcp: tokio::net::TcpStream, cluster: Fingerprint) -> Result<Stream, TlsError> {
    let connected = TlsConnector::from(tls::pinned_client(cluster)?).connect(tls::server_name(), tcp).await;
    let stream = connected.map_err(TlsError::of_io)?;
    let peer = tls::expect(stream.get_ref().1.peer_certificates(), Role::Enrolment)?;
    Ok(Stream::Encrypted(Box::new(TlsStream::Client(stream)), Some(peer)))
}
