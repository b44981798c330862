//! Which node serves which model, where a cluster serves several: a pure function of wishes and of who has joined.
//!
//! Layout: [`events`](Event) (what goes in and out), `calls` (what operators want), `sharing` (who belongs where), `records` (what
//! is durable).
//!
//! The scheduler's *own* model is the one of its configuration: nodes belong to it unless another one has them. A deployed model
//! has as many nodes as was asked for; it takes those that stand by at the own model, and gives them back. How a model is laid out
//! on its nodes, and everything else about it, is a matter of its own cores, which know nothing of others.
//!
//! **Invariants:** no tokio, clock, randomness or I/O. A node belongs to one model at a time. One that has a place is given up only
//! where its model is to have fewer nodes, or to go, and only once it has none any more. A model has nodes only while its record is
//! stored. With the same wishes and the same nodes nothing changes.

mod calls;
mod events;
mod records;
mod sharing;

pub use events::{Caller, DeployedRecord, Effect, Event, Facts, FleetRecord, NodeFact};

use crate::ModelCard;
use crate::cluster::ClusterConfig;
use crate::time::Millis;
use ashlar_protocol::models::DeployModel;
use ashlar_vocabulary::{ModelDigest, NodeId};
use records::Writing;
use std::collections::{BTreeMap, BTreeSet};

/// The name of the record about the scheduler's own model. No model can be called this.
pub const OWN: &str = "@own";

/// Most models that are deployed at once.
pub const MODELS_MAX: usize = 32;

/// All models of a cluster.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// How the scheduler's own model is laid out; others differ from it in what was asked for.
    template: ClusterConfig,
    own_nodes: Option<u32>,
    models: BTreeMap<String, Model>,
    /// Models whose files are being read.
    opening: BTreeMap<String, Opening>,
    writing: BTreeMap<String, Writing>,
    /// Since when nodes that belong to a model have not been there.
    absent: BTreeMap<NodeId, Millis>,
    /// Nodes that are to hold nothing where they are.
    withheld: BTreeSet<NodeId>,
}

/// A deployed model.
#[derive(Debug, Clone)]
struct Model {
    record: DeployedRecord,
    /// Members that are to be given up once they hold nothing.
    parting: BTreeSet<NodeId>,
    /// Whether its cores have been started.
    started: bool,
}

#[derive(Debug, Clone)]
struct Opening {
    request: DeployModel,
    callers: Vec<Caller>,
}

impl Fleet {
    /// The fleet as it was stored. What it wants at first comes with the first event.
    pub fn new(template: ClusterConfig, stored: Vec<(String, FleetRecord)>) -> Fleet {
        let mut fleet = Fleet {
            template,
            own_nodes: None,
            models: BTreeMap::new(),
            opening: BTreeMap::new(),
            writing: BTreeMap::new(),
            absent: BTreeMap::new(),
            withheld: BTreeSet::new(),
        };
        let mut claimed = BTreeSet::new();
        for (name, record) in stored {
            fleet.writing.insert(name.clone(), Writing::stored(record.clone()));
            match record {
                FleetRecord::Own { nodes } => fleet.own_nodes = Some(nodes),
                FleetRecord::Deployed(mut record) => {
                    // Never so, unless somebody has edited them.
                    record.members.retain(|node| claimed.insert(node.clone()));
                    let model = Model { record: *record, parting: BTreeSet::new(), started: false };
                    fleet.models.insert(name, model);
                }
            }
        }
        fleet
    }

    /// Applies one event, then closes what difference between wishes and `facts` can be closed.
    pub fn handle(&mut self, now: Millis, event: Event, facts: &Facts, effects: &mut Vec<Effect>) {
        match event {
            Event::Deploy(caller, request) => self.deploy(caller, *request, facts, effects),
            Event::Opened { name, outcome } => self.opened(&name, outcome, facts, effects),
            Event::Scale(caller, wish) => self.scale(caller, wish, facts, effects),
            Event::Remove(caller, name) => self.remove(caller, &name, effects),
            Event::GatewayGone(gateway) => {
                self.opening.values_mut().for_each(|open| open.callers.retain(|(who, _)| *who != gateway));
                self.writing.values_mut().for_each(|write| write.callers.retain(|(who, _)| *who != gateway));
            }
            Event::Persisted { name, outcome } => self.persisted(now, &name, outcome, effects),
            Event::Tick => {}
        }
        self.share_out(now, facts, effects);
        self.persist(now, effects);
        // Whoever is answered sees what has been done.
        effects.sort_by_key(|effect| matches!(effect, Effect::Reply(..)));
    }

    /// The deployed model to which a node belongs; `None` is the scheduler's own.
    pub fn route(&self, node: &NodeId) -> Option<&str> {
        let owner = self.models.iter().find(|(_, model)| model.record.members.contains(node));
        owner.filter(|(_, model)| model.started).map(|(name, _)| name.as_str())
    }

    /// Whether a node is to hold nothing where it is.
    pub fn is_withheld(&self, node: &NodeId) -> bool {
        self.withheld.contains(node)
    }

    /// Whether there is, or was, anything but the scheduler's own model.
    pub fn is_plain(&self) -> bool {
        self.models.is_empty()
            && self.opening.is_empty()
            && self.own_nodes.is_none()
            && self.withheld.is_empty()
            && self.writing.is_empty()
    }

    /// How many nodes belong to deployed models.
    pub fn nodes_deployed(&self) -> usize {
        self.models.values().map(|model| model.record.members.len()).sum()
    }

    /// How many nodes the scheduler's own model is to have at most.
    pub fn own_nodes(&self) -> Option<u32> {
        self.own_nodes
    }

    /// Deployed models whose record is stored, by name.
    pub fn deployed(&self) -> impl Iterator<Item = (&str, &DeployedRecord)> {
        let started = self.models.iter().filter(|(_, model)| model.started);
        started.map(|(name, model)| (name.as_str(), &model.record))
    }

    /// The deployed model of a digest, and whether it is to go.
    pub fn of_digest(&self, digest: &ModelDigest) -> Option<(&str, bool)> {
        let (name, record) = self.deployed().find(|(_, record)| record.card.digest == *digest)?;
        Some((name, record.removing))
    }

    /// How a model is to be laid out on its nodes.
    fn config_of(&self, request: &DeployModel, card: &ModelCard) -> ClusterConfig {
        let number = |wish: Option<u32>| wish.map(|wish| wish as usize);
        ClusterConfig {
            model: card.source.clone(),
            precision: card.precision,
            model_digest: card.digest,
            shape: card.shape.clone(),
            max_context_tokens: card.max_context_tokens,
            stages: number(request.stages),
            tensor_parallel_size: number(request.tensor_parallel_size),
            replicas: number(request.replicas),
            spread_head: None,
            // Whoever is missing may never come: what is there serves.
            expected_nodes: None,
            ..self.template.clone()
        }
    }
}
