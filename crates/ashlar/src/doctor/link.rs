//! Whether another machine's listener is reached from here, and how fast. Nothing is sent but what makes a connection.

use crate::findings::Finding;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(3);
/// Connections whose median is told: each takes a round trip.
const ATTEMPTS: usize = 5;
/// A step crosses each link between stages once.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(5);

/// Looks at the way to `target` (`host:port`).
pub(super) fn examine(target: &str) -> Vec<Finding> {
    let addresses = match target.to_socket_addrs() {
        Ok(addresses) => addresses.collect::<Vec<_>>(),
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            return vec![Finding::problem(
                format!("{target} is no address"),
                "Write HOST:PORT, for example 10.0.0.7:7401.",
            )];
        }
        Err(error) => {
            return vec![Finding::problem(
                format!("the name in {target} does not resolve: {error}"),
                "Check the name, and that this machine asks a name server that knows it; an IP address would do, too.",
            )];
        }
    };
    if addresses.is_empty() {
        return vec![Finding::problem(format!("{target} has no address"), "Check the name.")];
    }
    addresses.into_iter().flat_map(of_address).collect()
}

fn of_address(address: SocketAddr) -> Vec<Finding> {
    let mut times = Vec::new();
    for _ in 0..ATTEMPTS {
        let started = Instant::now();
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(_) => times.push(started.elapsed()),
            Err(error) => return vec![failed(address, &error)],
        }
    }
    let first = times.first().copied().unwrap_or_default();
    times.sort_unstable();
    vec![reached(address, first, times.get(times.len() / 2).copied().unwrap_or_default())]
}

fn reached(address: SocketAddr, first: Duration, round_trip: Duration) -> Finding {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let what = format!(
        "{address} takes connections: the first took {:.2} ms, a round trip {:.2} ms (median of {ATTEMPTS})",
        milliseconds(first),
        milliseconds(round_trip)
    );
    if round_trip > ROUND_TRIP_MAX {
        return Finding::warning(
            what,
            "Each token crosses every link between stages, and twice per layer those of tensor parallelism: keep stages of one \
             replica on one network, and tell the scheduler what links take (`links`).",
        );
    }
    Finding::good(what)
}

fn failed(address: SocketAddr, error: &std::io::Error) -> Finding {
    match error.kind() {
        ErrorKind::ConnectionRefused => Finding::problem(
            format!("{address} refuses: the machine is there, but nobody listens on that port"),
            "Start the role, check its port, and that it does not listen on 127.0.0.1 alone.",
        ),
        ErrorKind::TimedOut => Finding::problem(
            format!("{address} does not answer within {} s", TIMEOUT.as_secs()),
            "A firewall drops what comes for that port, or the machine is down: allow the port there and on the way.",
        ),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Finding::problem(
            format!("there is no way to {address}: {error}"),
            "Check the routes of this machine (ip route), and that both are on one network.",
        ),
        _ => Finding::problem(format!("{address} cannot be reached: {error}"), "The system's words say why."),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;
    use crate::findings::Mark;
    use std::net::TcpListener;

    #[test]
    fn a_listener_is_reached_and_one_that_is_gone_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = examine(&address.to_string());
        assert!(found.len() == 1 && found[0].what.contains("takes connections"), "{found:?}");
        drop(listener);
        let found = examine(&address.to_string());
        assert!(found[0].mark == Mark::Problem && found[0].what.contains("refuses"), "{found:?}");
    }

    #[test]
    fn what_is_wrong_with_an_address_or_a_link_is_said() {
        assert!(examine("nowhere")[0].what.contains("is no address"));
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        assert_eq!(reached(address, Duration::ZERO, Duration::from_millis(9)).mark, Mark::Warning);
        let timed_out = failed(address, &ErrorKind::TimedOut.into());
        assert!(timed_out.todo.unwrap().contains("firewall"));
    }
}
