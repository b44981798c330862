//! The cluster that is disturbed, as those see it who run it.

use super::fault::{Role, is_drilled};
use crate::http::Client;
use crate::network::{self, Layout};
use crate::processes;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for the cluster to be whole again after a fault.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// A gateway that is frozen does not answer at all.
const ANSWER_MAX: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);

/// A cluster of `ashlar up` on this machine.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) state: PathBuf,
    pub(super) client: Client,
    network: Option<Layout>,
}

impl Target {
    /// The cluster with this state directory. What an earlier drill has cut off is joined again.
    pub(super) fn open(state: &Path, client: Client) -> Result<Target> {
        let state = fs::canonicalize(state)
            .with_context(|| format!("there is no state directory {}", state.display()))?;
        processes::read(&state)?;
        let network = network::read(&state)?;
        if let Some(network) = &network {
            network.heal()?;
        }
        Ok(Target { state, client, network })
    }

    /// Where its roles can be cut off from each other.
    pub(super) fn network(&self) -> Result<&Layout> {
        self.network.as_ref().context(
            "roles can be cut off only where each has a network of its own: start the cluster with `ashlar up --separate`",
        )
    }

    /// Waits until every process runs, has joined, and every replica serves.
    pub(super) async fn whole(&self) -> Result<()> {
        let began = Instant::now();
        while self.is_whole().await? != Some(true) {
            if began.elapsed() > RECOVERY_MAX {
                bail!("the cluster is not whole within {} s", RECOVERY_MAX.as_secs());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Waits until the cluster's own view says that something is missing; for ever if it never does.
    pub(super) async fn misses_something(&self) {
        while !matches!(self.is_whole().await, Ok(Some(false))) {
            tokio::time::sleep(POLL).await;
        }
    }

    /// `None` where nobody answers.
    async fn is_whole(&self) -> Result<Option<bool>> {
        let expected = processes::read(&self.state)?
            .keys()
            .filter(|name| is_drilled(name) && Role::of(name) == Role::Node)
            .count();
        let asked = tokio::time::timeout(ANSWER_MAX, self.client.get("/admin/cluster")).await;
        let Ok(Ok((200, view))) = asked else { return Ok(None) };
        Ok(Some(shows_all(&view, expected)))
    }
}

/// Whether a view has so many nodes, and replicas that all serve.
fn shows_all(view: &Value, nodes: usize) -> bool {
    let list = |field: &str| view["cluster"][field].as_array().cloned().unwrap_or_default();
    let ready = list("replicas").iter().all(|replica| replica["ready"] == true);
    view["ready"] == true && ready && list("nodes").len() >= nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_or_a_replica_less_is_missed() {
        let view = |ready: bool, replica: bool| json!({"ready": ready, "cluster": {"nodes": [{}, {}], "replicas": [{"ready": true}, {"ready": replica}]}});
        assert!(shows_all(&view(true, true), 2));
        assert!(!shows_all(&view(true, true), 3));
        assert!(!shows_all(&view(true, false), 2) && !shows_all(&view(false, true), 2));
    }
}
