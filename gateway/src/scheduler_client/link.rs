//! What the gateway knows of the scheduler and the cluster behind it.

use ashlar_protocol::serving::ClusterSnapshot;
use std::sync::Arc;

/// The connection, and the cluster as last reported over it.
#[derive(Debug, Clone)]
pub struct Link {
    /// Whether the connection stands.
    pub connected: bool,
    /// The last snapshot; kept when the connection is lost.
    pub cluster: Option<Arc<ClusterSnapshot>>,
    /// Why the connection does not stand.
    pub problem: String,
}

impl Link {
    /// Before the first connection to `address`.
    pub fn connecting(address: &str) -> Link {
        Link { connected: false, cluster: None, problem: format!("connecting to the scheduler at {address}") }
    }

    /// The cluster, while the connection stands.
    pub fn live_cluster(&self) -> Result<&Arc<ClusterSnapshot>, String> {
        match &self.cluster {
            Some(cluster) if self.connected => Ok(cluster),
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
