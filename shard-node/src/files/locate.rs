//! Where a node gets its model: from this machine, or from what it has fetched before and fetches now.

use super::cache::ModelCache;
use super::fetch::{Candidate, Fetch, FetchError, Goal};
use super::hub::Hub;
use super::peer::{Peer, PeerLinks};
use crate::config::{FetchPolicy, NodeConfig};
use ashlar_model::digest::model_digest;
use ashlar_model::hub;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use tracing::{info, warn};

/// How often whoever waits is told how far it is.
const REPORT: Duration = Duration::from_millis(50);

/// What an assignment wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// What the scheduler calls the model.
    pub(crate) name: String,
    pub(crate) goal: Goal,
    /// Addresses of nodes that may have it.
    pub(crate) peers: Vec<String>,
    pub(crate) links: PeerLinks,
}

/// Bytes that are there, of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) ready: u64,
    pub(crate) total: u64,
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LocateError {
    /// It is not on this machine, and is not to be fetched.
    #[error("{own}; this node is not to fetch it (`fetch = \"never\"`)")]
    NotHere {
        /// What was found instead.
        own: String,
    },
    /// Nobody has it.
    #[error("the model's files are not to be had: {own}; {fetch}")]
    NotFetched {
        /// What was found on this machine.
        own: String,
        /// What others said.
        fetch: FetchError,
    },
}

/// Finds models.
#[derive(Debug)]
pub(crate) struct Locator {
    /// What the node's owner calls the model.
    own: Option<String>,
    policy: FetchPolicy,
    cache: ModelCache,
}

impl Locator {
    /// As the node's configuration says.
    pub(crate) fn new(config: &NodeConfig) -> Locator {
        let models = config.models.clone().unwrap_or_else(|| config.state.join("models"));
        Locator { own: config.model.clone(), policy: config.fetch, cache: ModelCache::new(models) }
    }

    /// A directory (or GGUF file) from which the slices can be loaded, of the right digest. While it is fetched, `waiting` hears how
    /// far it is, often, and says whether it is still wanted.
    pub(crate) fn locate(
        &self,
        wanted: &Wanted,
        waiting: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<PathBuf, LocateError> {
        let name = self.own.as_deref().unwrap_or(&wanted.name);
        let own = match self.policy {
            FetchPolicy::Always => {
                "what this machine has is not to be used (`fetch = \"always\"`)".to_owned()
            }
            FetchPolicy::Missing | FetchPolicy::Never => match self.on_this_machine(name, wanted) {
                Ok(directory) => return Ok(directory),
                Err(reason) => reason,
            },
        };
        if self.policy == FetchPolicy::Never {
            return Err(LocateError::NotHere { own });
        }
        if self.own.is_some() {
            warn!("{own}; looking elsewhere");
        }
        self.fetch(name, wanted, waiting).map_err(|fetch| LocateError::NotFetched { own, fetch })
    }

    fn on_this_machine(&self, name: &str, wanted: &Wanted) -> Result<PathBuf, String> {
        let directory = match self.policy {
            // A hub's own cache is a place on this machine, too.
            FetchPolicy::Never => hub::resolve(name, &mut |file| info!("fetching {file} of {name}"))
                .map_err(|error| error.to_string())?,
            _ => hub::local(name).ok_or_else(|| format!("`{name}` is not on this machine"))?,
        };
        let digest = model_digest(&directory, wanted.goal.precision).map_err(|error| error.to_string())?;
        if digest != wanted.goal.model {
            return Err(format!(
                "{} has digest {digest}, the cluster serves {}: give every node the same model",
                directory.display(),
                wanted.goal.model
            ));
        }
        Ok(directory)
    }

    /// Fetches on a thread of its own, so that whoever waits can say that it lives.
    fn fetch(
        &self,
        name: &str,
        wanted: &Wanted,
        waiting: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<PathBuf, FetchError> {
        let stop = AtomicBool::new(false);
        let progress: Mutex<Option<Progress>> = Mutex::new(None);
        let heard = |ready, total| {
            *progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(Progress { ready, total });
        };
        let fetch = Fetch { cache: &self.cache, goal: &wanted.goal, progress: &heard, stop: &stop };
        let candidates = candidates(name, wanted);
        std::thread::scope(|scope| {
            let (done, outcome) = mpsc::sync_channel(1);
            scope.spawn(move || {
                // Whoever waits does so until this comes, or the thread has ended.
                let _ = done.send(fetch.run(candidates));
            });
            loop {
                match outcome.recv_timeout(REPORT) {
                    Ok(outcome) => return outcome,
                    // It has panicked, which the scope reports.
                    Err(RecvTimeoutError::Disconnected) => return Err(FetchError::Stopped),
                    Err(RecvTimeoutError::Timeout) => {}
                }
                let now = *progress.lock().unwrap_or_else(PoisonError::into_inner);
                if !waiting(now) {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        })
    }
}

/// Nodes first: they are near. Then the hub, if the model is called like one of a hub.
fn candidates<'a>(name: &'a str, wanted: &'a Wanted) -> Vec<Candidate<'a>> {
    let peer = |address: &'a String| {
        let connect = move || {
            let peer = Peer::connect(address, wanted.goal.model, &wanted.links)?;
            Ok(Box::new(peer) as Box<dyn super::source::Source>)
        };
        Candidate::new(format!("node at {address}"), connect)
    };
    let on_hub = [name, wanted.name.as_str()].into_iter().find(|name| hub::is_id(name));
    let hub = on_hub.map(|id| {
        let connect = move || Ok(Box::new(Hub::connect(id)?) as Box<dyn super::source::Source>);
        Candidate::new(format!("the hub ({id})"), connect)
    });
    wanted.peers.iter().map(peer).chain(hub).collect()
}
