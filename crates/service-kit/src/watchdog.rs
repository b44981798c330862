//! Signs of life to whoever supervises this process, in the way of systemd's `WatchdogSec=`: datagrams `WATCHDOG=1` to the
//! socket that `NOTIFY_SOCKET` names (see sd_notify(3)). A supervisor that hears nothing for long enough kills the process.
//!
//! Without these variables, and on systems without such sockets, nothing is sent.

use std::time::Duration;

/// Where a supervisor listens: a path, or `@` and an abstract name.
pub const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// After how much silence it acts, in microseconds.
pub const LIMIT_VARIABLE: &str = "WATCHDOG_USEC";
/// What a sign of life says.
pub const BEAT: &[u8] = b"WATCHDOG=1";

/// Sends signs of life. They should come from the loop whose hanging is to be noticed.
#[derive(Debug)]
pub struct Watchdog {
    #[cfg(target_os = "linux")]
    socket: Option<std::os::unix::net::UnixDatagram>,
    /// How often a sign is due.
    interval: Duration,
}

impl Watchdog {
    /// As the supervisor wants it, or one that sends nothing.
    pub fn from_environment() -> Watchdog {
        let limit_us = std::env::var(LIMIT_VARIABLE).ok().and_then(|limit| limit.parse().ok());
        let limit = Duration::from_micros(limit_us.unwrap_or(10_000_000_u64).max(1_000));
        Watchdog {
            #[cfg(target_os = "linux")]
            socket: std::env::var(SOCKET_VARIABLE).ok().and_then(|name| connect(&name).ok()),
            interval: limit / 4,
        }
    }

    /// How often [`beat`](Self::beat) is to be called.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// A sign of life. Never waits; a supervisor that does not read loses nothing by it.
    pub fn beat(&self) {
        #[cfg(target_os = "linux")]
        if let Some(socket) = &self.socket {
            let _ = socket.send(BEAT);
        }
    }

    /// Signs of life for as long as it is polled.
    pub async fn keep_beating(&self) -> std::convert::Infallible {
        let mut due = tokio::time::interval(self.interval);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            self.beat();
        }
    }
}

#[cfg(target_os = "linux")]
fn connect(name: &str) -> std::io::Result<std::os::unix::net::UnixDatagram> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
