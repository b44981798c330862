//! Who belongs where.

use super::events::{Effect, Facts, NodeFact};
use super::{Fleet, OWN};
use crate::time::Millis;
use ashlar_vocabulary::{ModelDigest, NodeId};
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// A member that has not been there for so long is replaced, where another node is free. A process that is started again is back
/// within seconds, and a machine within this.
const ABSENT_MS: u64 = 60_000;

impl Fleet {
    /// Moves who belongs where towards what is wished, as far as that is possible now.
    pub(super) fn share_out(&mut self, now: Millis, facts: &Facts, effects: &mut Vec<Effect>) {
        self.start(effects);
        self.note_absent(now, facts);
        let names: Vec<String> = self.models.keys().cloned().collect();
        for name in &names {
            self.give_back(name, facts);
        }
        for name in &names {
            self.claim(now, name, facts);
        }
        self.end_removed(facts, effects);
        self.move_misplaced(facts, effects);
        self.withhold(facts, effects);
    }

    /// Models whose record has just been stored.
    fn start(&mut self, effects: &mut Vec<Effect>) {
        let names: Vec<String> = self.models.keys().cloned().collect();
        for name in names {
            let stored = self.stored(&name).is_some();
            let Some(model) = self.models.get_mut(&name).filter(|model| stored && !model.started) else {
                continue;
            };
            model.started = true;
            let (request, card) = (model.record.request.clone(), model.record.card.clone());
            effects.push(Effect::Start { name, config: Box::new(self.config_of(&request, &card)) });
        }
    }

    fn note_absent(&mut self, now: Millis, facts: &Facts) {
        let members: BTreeSet<&NodeId> =
            self.models.values().flat_map(|model| &model.record.members).collect();
        self.absent.retain(|node, _| members.contains(node) && !facts.nodes.contains_key(node));
        for node in members.into_iter().filter(|node| !facts.nodes.contains_key(*node)) {
            self.absent.entry(node.clone()).or_insert(now);
        }
    }

    /// Fewer nodes: first those that are not there, then those without a place, then others. They stay members until they
    /// hold nothing.
    fn give_back(&mut self, name: &str, facts: &Facts) {
        let stored = self.stored(name).filter(|stored| !stored.removing);
        let Some(wanted) = stored.map(|stored| stored.request.nodes as usize) else { return };
        let Some(model) = self.models.get_mut(name) else { return };
        let seated = |node: &NodeId| {
            facts.nodes.get(node).is_some_and(|fact| fact.at.as_deref() == Some(name) && fact.seated())
        };
        let (members, parting) = (&mut model.record.members, &mut model.parting);
        parting.retain(|node| members.contains(node));
        while members.len() - parting.len() < wanted
            && let Some(node) = parting.pop_first()
        {
            // It stays after all.
            debug_assert!(members.contains(&node));
        }
        while members.len() - parting.len() > wanted {
            let staying = members.iter().filter(|node| !parting.contains(*node));
            // Whole replicas, as far as possible.
            let victim = staying.min_by_key(|node| {
                let replica = facts.nodes.get(*node).and_then(|fact| fact.replica);
                (facts.nodes.contains_key(*node), seated(node), Reverse(replica), Reverse(*node))
            });
            let Some(victim) = victim.cloned() else { break };
            parting.insert(victim);
        }
        parting.retain(|node| {
            let holds = seated(node);
            if !holds {
                members.remove(node);
            }
            holds
        });
    }

    /// More nodes: those that stand by, instead of nobody or of members that do not come back.
    fn claim(&mut self, now: Millis, name: &str, facts: &Facts) {
        loop {
            let stored = self.stored(name).filter(|stored| !stored.removing);
            let Some(wanted) = stored.map(|stored| stored.request.nodes as usize) else { return };
            let Some(model) = self.models.get(name).filter(|model| !model.record.removing) else { return };
            let lost =
                |node: &&NodeId| self.absent.get(*node).is_some_and(|since| now.since(*since) > ABSENT_MS);
            let staying = model.record.members.len() - model.parting.len();
            let lost = match staying < wanted {
                true => None,
                false => match model.record.members.iter().find(lost) {
                    Some(lost) => Some(lost.clone()),
                    None => return,
                },
            };
            let candidates = self.candidates(Some(model.record.card.digest), facts);
            let Some(node) = candidates.first().map(|fact| fact.device.node.clone()) else { return };
            let Some(model) = self.models.get_mut(name) else { return };
            if let Some(lost) = lost {
                model.record.members.remove(&lost);
                model.parting.remove(&lost);
            }
            model.record.members.insert(node);
        }
    }

    /// Nodes that a model could have, the best first: those that the scheduler's own model is not to have anyway, that hold the
    /// model's weights already, with the most memory.
    pub(super) fn candidates<'a>(&self, digest: Option<ModelDigest>, facts: &'a Facts) -> Vec<&'a NodeFact> {
        let mut free = self.free_soon(digest, facts);
        free.retain(|fact| !fact.seated());
        free
    }

    /// The same, with those that are about to be free: they hold a place that they are to give up.
    pub(super) fn free_soon<'a>(&self, digest: Option<ModelDigest>, facts: &'a Facts) -> Vec<&'a NodeFact> {
        let free = |fact: &&NodeFact| {
            let node = &fact.device.node;
            // One that the own model may need is left to it.
            let stands_by = !fact.seated() && self.stored_own_nodes().is_none() && facts.own_serves;
            let spare = self.withheld.contains(node) || stands_by;
            let claimed = self.models.values().any(|model| model.record.members.contains(node));
            fact.at.is_none() && !fact.leaving && fact.sound && spare && !claimed
        };
        let mut free: Vec<&NodeFact> = facts.nodes.values().filter(free).collect();
        free.sort_by_key(|fact| {
            let holds = digest.is_some() && fact.holds == digest;
            let node = &fact.device.node;
            (!self.withheld.contains(node), !holds, Reverse(fact.device.memory), node.clone())
        });
        free
    }

    /// Models that are to go, and in whose name nothing is in progress any more.
    fn end_removed(&mut self, facts: &Facts, effects: &mut Vec<Effect>) {
        let over = |(name, model): (&String, &super::Model)| {
            let removing = self.stored(name).is_some_and(|stored| stored.removing) && model.record.removing;
            let over = removing && (!model.started || facts.idle.contains(name));
            over.then(|| name.clone())
        };
        let over: Vec<String> = self.models.iter().filter_map(over).collect();
        for name in over {
            if self.models.remove(&name).is_some_and(|model| model.started) {
                effects.push(Effect::Stop(name));
            }
        }
    }

    fn move_misplaced(&self, facts: &Facts, effects: &mut Vec<Effect>) {
        for (node, fact) in &facts.nodes {
            let belongs = self.route(node);
            if belongs == fact.at.as_deref() {
                continue;
            }
            let reason = match belongs {
                Some(model) => format!("this node is to serve {model}: come again"),
                None => "this node is to serve the scheduler's own model: come again".to_owned(),
            };
            effects.push(Effect::Move { node: node.clone(), reason });
        }
    }

    fn withhold(&mut self, facts: &Facts, effects: &mut Vec<Effect>) {
        let mut wanted: BTreeSet<NodeId> =
            self.models.values().flat_map(|model| &model.parting).cloned().collect();
        if let Some(most) = self.stored_own_nodes() {
            let surplus = self.own_by_rank(facts).into_iter().skip(most as usize);
            wanted.extend(surplus.map(|fact| fact.device.node.clone()));
            // One that comes back is not to be given a place before it is counted.
            let away = |node: &&NodeId| !facts.nodes.contains_key(*node) && self.route(node).is_none();
            wanted.extend(self.withheld.iter().filter(away).cloned());
        }
        for node in wanted.symmetric_difference(&self.withheld) {
            effects.push(Effect::Withhold { node: node.clone(), withheld: wanted.contains(node) });
        }
        self.withheld = wanted;
    }

    /// The nodes of the scheduler's own model, those first that it keeps.
    pub(super) fn own_by_rank<'a>(&self, facts: &'a Facts) -> Vec<&'a NodeFact> {
        let own =
            |fact: &&NodeFact| fact.at.is_none() && !fact.leaving && self.route(&fact.device.node).is_none();
        let mut own: Vec<&NodeFact> = facts.nodes.values().filter(own).collect();
        own.sort_by_key(|fact| {
            let node = &fact.device.node;
            let holds = fact.holds == Some(self.template.model_digest);
            (self.withheld.contains(node), !fact.seated(), fact.replica, !holds, node.clone())
        });
        own
    }

    /// What a model is short of, in numbers; nothing if it has the nodes that it is to have.
    pub fn shortage(&self, name: &str, facts: &Facts) -> Option<String> {
        debug_assert_ne!(name, OWN);
        let model = self.models.get(name)?;
        let (wanted, members) = (model.record.request.nodes as usize, &model.record.members);
        if members.len() < wanted {
            let free = self.candidates(Some(model.record.card.digest), facts);
            let described = self.describe_free(&free, facts);
            return Some(format!("it wants {wanted} nodes, has {}, and {described}", members.len()));
        }
        let missing: Vec<&str> = members
            .iter()
            .filter(|node| facts.nodes.get(*node).is_none_or(|fact| fact.at.as_deref() != Some(name)))
            .map(|node| node.0.as_str())
            .collect();
        (!missing.is_empty()).then(|| {
            let (missing, count) = (missing.join(", "), missing.len());
            format!(
                "it wants {wanted} nodes, and {count} of those that belong to it have not joined: {missing}"
            )
        })
    }
}
