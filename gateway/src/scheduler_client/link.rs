//! What the gateway knows of the scheduler and the cluster behind it.

use crate::access::KeyTable;
use ashlar_protocol::models::ModelsView;
use ashlar_protocol::serving::ClusterSnapshot;
use ashlar_service_kit::Addresses;
use std::sync::Arc;

/// The connection, and the cluster as last reported over it.
#[derive(Debug, Clone)]
pub struct Link {
    /// Whether the connection stands.
    pub connected: bool,
    /// The last snapshot; kept when the connection is lost.
    pub cluster: Option<Arc<ClusterSnapshot>>,
    /// The models beside the scheduler's own one, as last told.
    pub models: Arc<ModelsView>,
    /// The keys that are let in, as last told; `None` before that.
    pub keys: Option<Arc<KeyTable>>,
    /// Why the connection does not stand.
    pub problem: String,
    /// Counts the connections that have stood: with each new one, what was submitted before has to be submitted again.
    pub epoch: u64,
    /// Whether there has been no scheduler for so long that nobody who has not begun shall wait for one.
    pub given_up: bool,
}

impl Link {
    /// Before the first connection to any of `addresses`.
    pub fn connecting(addresses: &Addresses) -> Link {
        Link {
            connected: false,
            cluster: None,
            models: Arc::default(),
            keys: None,
            problem: format!("connecting to the scheduler at {addresses}"),
            epoch: 0,
            given_up: false,
        }
    }

    /// The same as whoever asks for a deployed model sees it: the cluster is that model's part.
    pub fn of_model(&self, name: &str) -> Link {
        let view = self.models.deployed.iter().find(|view| view.request.name == name);
        let problem = match view {
            None if self.connected => format!("the model `{name}` has been removed"),
            _ => self.problem.clone(),
        };
        Link { cluster: view.map(|view| Arc::new(view.cluster.clone())), problem, ..self.clone() }
    }

    /// The cluster, while the connection stands.
    pub fn live_cluster(&self) -> Result<&Arc<ClusterSnapshot>, String> {
        match &self.cluster {
            Some(cluster) if self.connected => Ok(cluster),
            _ => Err(self.problem.clone()),
        }
    }

    /// The cluster as last seen, which requests are made for: while the connection does not stand they wait, unless the scheduler has
    /// been away for too long.
    pub fn known_cluster(&self) -> Result<&Arc<ClusterSnapshot>, String> {
        match &self.cluster {
            Some(cluster) if !self.given_up => Ok(cluster),
            _ => Err(self.problem.clone()),
        }
    }

    /// Whether a request would be computed now; else why not.
    pub fn ready(&self) -> Result<(), String> {
        let cluster = self.live_cluster()?;
        if cluster.replicas.iter().any(|replica| replica.ready) {
            return Ok(());
        }
        Err(cluster.problem.clone().unwrap_or_else(|| "no replica is ready yet".to_owned()))
    }
}
