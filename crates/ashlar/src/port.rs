//! Ports for child processes, kept from everybody else between choosing one and listening there.

use socket2::{Domain, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

/// A port that no other process is given while this lives: a socket is bound there that never listens.
///
/// A child that listens with `SO_REUSEADDR`, as the standard library and tokio do, may; the system neither hands the
/// port out nor uses it for outgoing connections. It also stays the child's own over restarts.
#[derive(Debug)]
pub(crate) struct ReservedPort {
    address: SocketAddr,
    _held: Socket,
}

impl ReservedPort {
    /// Any free port.
    pub(crate) fn any() -> io::Result<ReservedPort> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Bound alone first, so that nobody else's reservation is shared; opened to the child afterwards.
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        socket.set_reuse_address(true)?;
        let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(ReservedPort { address, _held: socket })
    }

    /// The port at `address`, or any free one if that is 0; refused where somebody listens already.
    pub(crate) fn at(address: SocketAddr) -> io::Result<ReservedPort> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // Connections that ended a moment ago do not matter, as to any listener.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(ReservedPort { address, _held: socket })
    }

    /// Where the child listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_port_asked_for_is_kept_from_others_and_refused_where_somebody_listens() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let port = ReservedPort::at(any).unwrap();
        assert!((0..2_000).all(|_| TcpListener::bind(any).unwrap().local_addr().unwrap() != port.address()));
        let listener = TcpListener::bind(port.address()).unwrap();
        let refused = ReservedPort::at(listener.local_addr().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_reserved_port_can_be_listened_on_again_and_again_but_is_handed_to_nobody() {
        let port = ReservedPort::any().unwrap();
        assert!(TcpStream::connect(port.address()).is_err(), "nobody listens yet");
        for _ in 0..2 {
            let listener = TcpListener::bind(port.address()).unwrap();
            let client = TcpStream::connect(port.address()).unwrap();
            let (served, _) = listener.accept().unwrap();
            drop((served, client));
        }
        assert!((0..2_000).all(|_| ReservedPort::any().unwrap().address() != port.address()));
    }
}
