//! How a cluster that computes requests may be less than it should be: `/ready` says it in words, metrics in numbers.

use ashlar_protocol::serving::ClusterSnapshot;

/// One way of being less than it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Degradation {
    /// More comes than can be computed: some is refused.
    Shedding,
    /// Not every replica serves.
    Replicas,
}

impl Degradation {
    pub(crate) const ALL: [Degradation; 2] = [Degradation::Shedding, Degradation::Replicas];

    /// As metrics name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Degradation::Shedding => "shedding",
            Degradation::Replicas => "replicas",
        }
    }

    /// Whether it is so now.
    pub(crate) fn is_in(self, cluster: &ClusterSnapshot) -> bool {
        match self {
            Degradation::Shedding => cluster.counters.shedding,
            Degradation::Replicas => cluster.replicas.iter().any(|replica| !replica.ready),
        }
    }

    /// For operators, and for whoever else may ask: it says nothing of anybody's requests.
    pub(crate) fn describe(self, cluster: &ClusterSnapshot) -> String {
        match self {
            Degradation::Shedding => "more requests come than can be computed: some are refused".to_owned(),
            Degradation::Replicas => {
                let serve = cluster.replicas.iter().filter(|replica| replica.ready).count();
                format!("{serve} of {} replicas serve", cluster.replicas.len())
            }
        }
    }
}
