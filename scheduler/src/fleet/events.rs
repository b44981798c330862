//! What the fleet is told, and what it wants done. Both are closed enums.

use crate::ModelCard;
use crate::cluster::ClusterConfig;
use crate::engine::GatewayId;
use ashlar_protocol::admin::AdminFailure;
use ashlar_protocol::models::{DeployModel, ScaleModel};
use ashlar_shard_plan::DeviceReport;
use ashlar_vocabulary::{ModelDigest, NodeId, ReplicaId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Who waits for an answer: a gateway's call.
pub type Caller = (GatewayId, u64);

/// What is stored of the fleet, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FleetRecord {
    /// Of the scheduler's own model, under [`OWN`](super::OWN).
    Own {
        /// The nodes that it is to have at most.
        nodes: u32,
    },
    /// Of a deployed model, under its name.
    Deployed(Box<DeployedRecord>),
}

/// A deployed model: all that is needed to serve it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeployedRecord {
    /// What was asked for.
    pub request: DeployModel,
    /// What its files said then.
    pub card: ModelCard,
    /// Its nodes.
    pub members: BTreeSet<NodeId>,
    /// Whether it is to go.
    pub removing: bool,
    /// Seconds since 1970.
    pub created_at: u64,
}

/// A joined node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeFact {
    /// What it offers, and its name.
    pub device: DeviceReport,
    /// The deployed model that it has joined; `None` is the scheduler's own.
    pub at: Option<String>,
    /// The replica in which it has a place there.
    pub replica: Option<ReplicaId>,
    /// Whether it leaves because its process ends, or because an operator wants it empty.
    pub leaving: bool,
    /// Whether it is taken for harmless.
    pub sound: bool,
    /// Of which model it has a slice in memory.
    pub holds: Option<ModelDigest>,
}

impl NodeFact {
    /// Whether it has a place.
    pub fn seated(&self) -> bool {
        self.replica.is_some()
    }
}

/// How the cluster is, all at once.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Facts {
    /// Joined nodes, by name.
    pub nodes: BTreeMap<NodeId, NodeFact>,
    /// Whether the scheduler's own model is served.
    pub own_serves: bool,
    /// Deployed models in whose name nothing is in progress, or nothing can be.
    pub idle: BTreeSet<String>,
    /// Seconds since 1970.
    pub unix_s: u64,
}

/// What the fleet is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Another model is to be served.
    Deploy(Caller, Box<DeployModel>),
    /// Its files have been read, as [`Effect::Open`] wanted.
    Opened {
        /// Its name.
        name: String,
        /// What they say, or why they cannot be read.
        outcome: Result<ModelCard, String>,
    },
    /// A model is to have more nodes, or fewer.
    Scale(Caller, ScaleModel),
    /// A deployed model is to go.
    Remove(Caller, String),
    /// A gateway waits for no answer any more.
    GatewayGone(GatewayId),
    /// An [`Effect::Persist`] has been done, or could not be.
    Persisted {
        /// The record's name.
        name: String,
        /// Why not.
        outcome: Result<(), String>,
    },
    /// Time passes.
    Tick,
}

/// What the fleet wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Read the files of a model; answered by [`Event::Opened`].
    Open(Box<DeployModel>),
    /// Store what is known under a name, or forget it; answered by [`Event::Persisted`].
    Persist(String, Option<FleetRecord>),
    /// Begin to serve a model on the nodes that will come to it.
    Start {
        /// Its name.
        name: String,
        /// What it is, and how it is laid out.
        config: Box<ClusterConfig>,
    },
    /// Serve a model no longer: fail what is still in progress.
    Stop(String),
    /// Close a node's connection: it comes again, and then to where it [belongs](super::Fleet::route).
    Move {
        /// Which.
        node: NodeId,
        /// Why, for the logs.
        reason: String,
    },
    /// Have a node hold nothing where it has joined, or let it be of use there again.
    Withhold {
        /// Which.
        node: NodeId,
        /// Whether.
        withheld: bool,
    },
    /// Answer a call: a deployed model by name, the scheduler's own (`None`), or why not.
    Reply(Caller, Result<Option<String>, AdminFailure>),
}
