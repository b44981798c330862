//! How machines join: the endpoint that hands out certificates ([`endpoint`]), the machine that asks for one ([`join`]), the
//! cluster that `ashlar up` opens to them ([`opening`]), and the commands around them ([`commands`]).

pub(crate) mod commands;
pub(crate) mod endpoint;
pub(crate) mod join;
pub(crate) mod opening;

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::Duration;

/// How long a token holds unless told.
pub(crate) const TOKEN_VALID: Duration = Duration::from_secs(60 * 60);
/// Where machines join unless told; schedulers listen for nodes on the ports above.
pub(crate) const JOIN_PORT: u16 = 7400;

/// What to run on a machine that shall join.
pub(crate) fn join_line(address: &str, token: &ashlar_identity::Token) -> String {
    format!("ashlar node --join {address} --token {}", token.reveal())
}

/// The address of this machine on the way to `address`. Nothing is sent.
pub(crate) fn own_address_towards(address: &str) -> io::Result<IpAddr> {
    let target = address.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// The address under which other machines reach this one, most likely: that of the way out.
pub(crate) fn own_address() -> IpAddr {
    // An address for documentation: no packet is sent to it.
    own_address_towards("192.0.2.1:9").unwrap_or(IpAddr::from([127, 0, 0, 1]))
}

/// An address as the host in `host:port`.
pub(crate) fn as_host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}
