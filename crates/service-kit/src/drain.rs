//! From a signal to an orderly end.
//!
//! Three things ask a process to end: SIGTERM or SIGINT (the first drains, the second ends it at once), and, for a
//! supervised child, the death of its parent, which it sees as the end of its standard input.

use std::fmt;
use std::pin::Pin;
use tokio::sync::watch;

/// Completes when a role is asked to end. Boxed, so that a role is compiled once and not wherever it is started.
pub type ShutdownRequest = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a role does until then.
pub type Serving<E> = Pin<Box<dyn Future<Output = Result<(), E>> + Send>>;

/// Set to `1` by a supervisor that holds the child's standard input open for as long as it lives.
pub const SUPERVISED_VARIABLE: &str = "ASHLAR_SUPERVISED";

/// Set by a supervisor where the process before this one crashed: the number of the signal.
pub const CRASHED_VARIABLE: &str = "ASHLAR_CRASHED_BY_SIGNAL";

/// Why the process should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownReason {
    /// SIGTERM.
    Terminate,
    /// SIGINT, Ctrl-C.
    Interrupt,
    /// The supervisor is gone.
    ParentGone,
    /// The process itself decided so.
    Requested,
}

impl fmt::Display for ShutdownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ShutdownReason::Terminate => "SIGTERM",
            ShutdownReason::Interrupt => "SIGINT",
            ShutdownReason::ParentGone => "the supervisor is gone",
            ShutdownReason::Requested => "requested",
        })
    }
}

/// Whether to end, shared by every task of the process; clones are the same.
#[derive(Debug, Clone)]
pub struct Shutdown {
    state: watch::Sender<Option<ShutdownReason>>,
}

impl Shutdown {
    /// One that only [`request`](Shutdown::request) triggers: for tests and for roles within another process.
    pub fn manual() -> Shutdown {
        Shutdown { state: watch::Sender::new(None) }
    }

    /// One that listens to signals and, with `ASHLAR_SUPERVISED=1`, to the end of standard input. Call it once per
    /// process, within a tokio runtime.
    ///
    /// # Errors
    /// If the system refuses a signal handler.
    pub fn listen() -> std::io::Result<Shutdown> {
        let shutdown = Shutdown::manual();
        listen_to_signals(shutdown.clone())?;
        if std::env::var_os(SUPERVISED_VARIABLE).is_some_and(|value| value == "1") {
            let shutdown = shutdown.clone();
            // A thread of its own: a pending read on tokio's stdin would hold up the end of the runtime.
            std::thread::Builder::new().name("parent-watch".into()).spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                shutdown.request(ShutdownReason::ParentGone);
            })?;
        }
        Ok(shutdown)
    }

    /// Asks for the end; the first reason stays.
    pub fn request(&self, reason: ShutdownReason) {
        self.state.send_if_modified(|state| {
            let first = state.is_none();
            if first {
                *state = Some(reason);
            }
            first
        });
    }

    /// Whether the end has been asked for, and why.
    pub fn reason(&self) -> Option<ShutdownReason> {
        *self.state.borrow()
    }

    /// Waits until the end is asked for; at once if it has been.
    pub async fn requested(&self) -> ShutdownReason {
        let mut state = self.state.subscribe();
        match state.wait_for(Option::is_some).await {
            Ok(reason) => reason.unwrap_or(ShutdownReason::Requested),
            // The sender is `self`; it cannot have gone.
            Err(_) => ShutdownReason::Requested,
        }
    }
}

#[cfg(unix)]
fn listen_to_signals(shutdown: Shutdown) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let mut signals = 0;
        loop {
            let (reason, status) = tokio::select! {
                _ = terminate.recv() => (ShutdownReason::Terminate, 128 + 15),
                _ = interrupt.recv() => (ShutdownReason::Interrupt, 128 + 2),
            };
            signals += 1;
            if signals > 1 {
                tracing::warn!(%reason, "second signal: ending at once");
                std::process::exit(status);
            }
            tracing::info!(%reason, "draining; a second signal ends the process at once");
            shutdown.request(reason);
        }
    });
    Ok(())
}

#[cfg(not(unix))]
fn listen_to_signals(shutdown: Shutdown) -> std::io::Result<()> {
    tokio::spawn(async move {
        let mut signals = 0;
        while tokio::signal::ctrl_c().await.is_ok() {
            signals += 1;
            if signals > 1 {
                std::process::exit(130);
            }
            shutdown.request(ShutdownReason::Interrupt);
        }
    });
    Ok(())
}
