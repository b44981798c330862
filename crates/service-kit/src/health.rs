//! Whether this process should be given work.

use tokio::sync::watch;

/// Readiness of a process, as its health endpoint reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet: what it is waiting for.
    Starting(String),
    /// Give it work.
    Ready,
    /// Not now: what is missing.
    Degraded(String),
    /// It finishes what it has and takes nothing new.
    Draining,
}

impl Readiness {
    /// Whether to give it work.
    pub fn is_ready(&self) -> bool {
        matches!(self, Readiness::Ready)
    }
}

/// The readiness of this process; clones share it.
#[derive(Debug, Clone)]
pub struct Health {
    state: watch::Sender<Readiness>,
}

impl Default for Health {
    fn default() -> Health {
        Health::new()
    }
}

impl Health {
    /// Starting.
    pub fn new() -> Health {
        Health { state: watch::Sender::new(Readiness::Starting("starting".into())) }
    }

    /// Changes the readiness. Draining is final: later changes are ignored.
    pub fn set(&self, readiness: Readiness) {
        self.state.send_if_modified(|state| {
            let change = *state != Readiness::Draining && *state != readiness;
            if change {
                *state = readiness;
            }
            change
        });
    }

    /// The readiness now.
    pub fn get(&self) -> Readiness {
        self.state.borrow().clone()
    }

    /// To wait for changes.
    pub fn subscribe(&self) -> watch::Receiver<Readiness> {
        self.state.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_final() {
        let health = Health::new();
        let shared = health.clone();
        assert!(!health.get().is_ready());
        shared.set(Readiness::Ready);
        assert!(health.get().is_ready());
        shared.set(Readiness::Draining);
        shared.set(Readiness::Ready);
        assert_eq!(health.get(), Readiness::Draining);
    }
}
