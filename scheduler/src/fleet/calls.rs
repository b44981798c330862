//! What operators want: deploy, scale, remove. What cannot be is refused at once, with numbers, and leaves nothing behind.

use super::events::{Caller, DeployedRecord, Effect, Facts, NodeFact};
use super::{Fleet, MODELS_MAX, Model, OWN, Opening};
use crate::ModelCard;
use crate::cluster::could_hold;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use ashlar_protocol::models::{DeployModel, ScaleModel, check_name};
use ashlar_shard_plan::DeviceReport;
use ashlar_vocabulary::NodeId;
use std::collections::BTreeSet;

/// Most nodes of one model.
const NODES_MAX: u32 = 1024;
/// Longest directory or hub id, in bytes.
const SOURCE_BYTES_MAX: usize = 4096;

type Checked<T> = Result<T, AdminFailure>;

fn failure(kind: AdminFailureKind, message: impl Into<String>) -> AdminFailure {
    AdminFailure { kind, message: message.into() }
}

fn invalid(message: impl Into<String>) -> AdminFailure {
    failure(AdminFailureKind::Invalid, message)
}

fn conflict(message: impl Into<String>) -> AdminFailure {
    failure(AdminFailureKind::Conflict, message)
}

impl Fleet {
    pub(super) fn deploy(
        &mut self,
        caller: Caller,
        request: DeployModel,
        facts: &Facts,
        effects: &mut Vec<Effect>,
    ) {
        let name = request.name.clone();
        match self.may_deploy(&request, facts) {
            Err(refusal) => effects.push(Effect::Reply(caller, Err(refusal))),
            Ok(Known::Deployed) => self.reply_once_stored(&name, caller),
            Ok(Known::Opening) => {
                self.opening.entry(name).and_modify(|opening| opening.callers.push(caller));
            }
            Ok(Known::Not) => {
                self.opening.insert(name, Opening { request: request.clone(), callers: vec![caller] });
                effects.push(Effect::Open(Box::new(request)));
            }
        }
    }

    fn may_deploy(&self, request: &DeployModel, facts: &Facts) -> Checked<Known> {
        let name = &request.name;
        check_name(name).map_err(invalid)?;
        if request.model.is_empty() || request.model.len() > SOURCE_BYTES_MAX {
            return Err(invalid("`model` is a directory, a GGUF file or a hub id"));
        }
        check_layout(request)?;
        let otherwise = || {
            conflict(format!(
                "a model is called {name} already, and is not what is asked for now: scale it, remove it, or choose another `name`"
            ))
        };
        if let Some(model) = self.models.get(name) {
            return match (model.record.removing, model.record.request == *request) {
                (true, _) => Err(conflict(format!("the model {name} is being removed: try again shortly"))),
                (false, true) => Ok(Known::Deployed),
                (false, false) => Err(otherwise()),
            };
        }
        if let Some(opening) = self.opening.get(name) {
            return if opening.request == *request { Ok(Known::Opening) } else { Err(otherwise()) };
        }
        if self.models.len() + self.opening.len() >= MODELS_MAX {
            let message = format!("{MODELS_MAX} models are deployed already: remove one first");
            return Err(failure(AdminFailureKind::Full, message));
        }
        self.enough_free(name, request.nodes as usize, facts)?;
        Ok(Known::Not)
    }

    pub(super) fn opened(
        &mut self,
        name: &str,
        outcome: Result<ModelCard, String>,
        facts: &Facts,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Opening { request, callers }) = self.opening.remove(name) else { return };
        let checked = outcome
            .map_err(|reason| invalid(format!("`{}` cannot be served: {reason}", request.model)))
            .and_then(|card| self.may_serve(&request, &card, facts).map(|()| card));
        match checked {
            Err(refusal) => {
                let refused = callers.into_iter().map(|caller| Effect::Reply(caller, Err(refusal.clone())));
                effects.extend(refused);
            }
            Ok(card) => {
                let record = DeployedRecord {
                    request,
                    card,
                    members: BTreeSet::new(),
                    removing: false,
                    created_at: facts.unix_s,
                };
                let model = Model { record, parting: BTreeSet::new(), started: false };
                self.models.insert(name.to_owned(), model);
                callers.into_iter().for_each(|caller| self.reply_once_stored(name, caller));
            }
        }
    }

    fn may_serve(&self, request: &DeployModel, card: &ModelCard, facts: &Facts) -> Checked<()> {
        if card.digest == self.template.model_digest {
            return Err(conflict(
                "these are the weights of the scheduler's own model: scale that one, or quantise this one otherwise",
            ));
        }
        let mut others = self.models.iter();
        if let Some((other, _)) = others.find(|(_, model)| model.record.card.digest == card.digest) {
            return Err(conflict(format!("these weights are deployed already, as {other}: scale that one")));
        }
        let devices = self.enough_free(&request.name, request.nodes as usize, facts)?;
        could_hold(&self.config_of(request, card), &devices).map_err(|problem| {
            conflict(format!("{} does not fit on {} nodes: {problem}", request.name, request.nodes))
        })
    }

    /// The nodes that a model would get.
    fn enough_free(&self, name: &str, wanted: usize, facts: &Facts) -> Checked<Vec<DeviceReport>> {
        let digest = self.models.get(name).map(|model| model.record.card.digest);
        let free = self.free_soon(digest, facts);
        if free.len() < wanted {
            return Err(conflict(format!(
                "{name} wants {wanted} {}nodes, {}: scale another model down, or let machines join",
                if digest.is_some() { "more " } else { "" },
                self.describe_free(&free, facts)
            )));
        }
        Ok(free.into_iter().take(wanted).map(|node| node.device.clone()).collect())
    }

    /// Who is free, and what the others do.
    pub(super) fn describe_free(&self, free: &[&NodeFact], facts: &Facts) -> String {
        let list = |names: Vec<&NodeId>| {
            names.into_iter().map(|name| name.0.as_str()).collect::<Vec<_>>().join(", ")
        };
        let is_free = |node: &NodeId| free.iter().any(|fact| fact.device.node == *node);
        let others: Vec<(&NodeId, &NodeFact)> =
            facts.nodes.iter().filter(|(name, _)| !is_free(name)).collect();
        let of = |wanted: &dyn Fn(&NodeFact) -> bool| {
            list(others.iter().filter(|(_, fact)| wanted(fact)).map(|(name, _)| *name).collect())
        };
        let mut said = match free.len() {
            0 => "none is free".to_owned(),
            1 => format!("1 is free ({})", free[0].device.node.0),
            count => {
                format!("{count} are free ({})", list(free.iter().map(|fact| &fact.device.node).collect()))
            }
        };
        let own = of(&|fact| fact.at.is_none() && !fact.leaving);
        if !own.is_empty() {
            let serves = if facts.own_serves { "" } else { ", which does not serve," };
            said.push_str(&format!("; the scheduler's own model{serves} has {own}"));
        }
        for name in self.models.keys() {
            let theirs = of(&|fact| fact.at.as_deref() == Some(name) && !fact.leaving);
            if !theirs.is_empty() {
                said.push_str(&format!("; {name} has {theirs}"));
            }
        }
        let leaving = of(&|fact| fact.leaving);
        if !leaving.is_empty() {
            said.push_str(&format!("; {leaving} leave"));
        }
        said
    }

    pub(super) fn scale(
        &mut self,
        caller: Caller,
        wish: ScaleModel,
        facts: &Facts,
        effects: &mut Vec<Effect>,
    ) {
        let name = wish.name.clone().unwrap_or_else(|| OWN.to_owned());
        let scaled = match (wish.name, wish.nodes) {
            (None, nodes) => self.scale_own(nodes, facts),
            (Some(name), Some(nodes)) => self.scale_deployed(&name, nodes, facts),
            (Some(_), None) => Err(invalid("say how many `nodes` it is to have")),
        };
        match scaled {
            Ok(()) => self.reply_once_stored(&name, caller),
            Err(refusal) => effects.push(Effect::Reply(caller, Err(refusal))),
        }
    }

    fn scale_own(&mut self, nodes: Option<u32>, facts: &Facts) -> Checked<()> {
        if let Some(nodes) = nodes {
            check_nodes(nodes)?;
            let kept: Vec<DeviceReport> =
                self.own_by_rank(facts).iter().take(nodes as usize).map(|fact| fact.device.clone()).collect();
            // Fewer than that may be there just now; then it is as it would be without this.
            if kept.len() == nodes as usize {
                could_hold(&self.template, &kept).map_err(|problem| {
                    conflict(format!("the scheduler's own model does not fit on {nodes} nodes: {problem}"))
                })?;
            }
        }
        self.own_nodes = nodes;
        Ok(())
    }

    fn scale_deployed(&mut self, name: &str, nodes: u32, facts: &Facts) -> Checked<()> {
        check_nodes(nodes)?;
        let model = self.models.get(name).ok_or_else(|| self.unknown(name))?;
        if model.record.removing {
            return Err(conflict(format!("the model {name} is being removed")));
        }
        let request = DeployModel { nodes, ..model.record.request.clone() };
        check_layout(&request)?;
        let members = &model.record.members;
        let more = (nodes as usize).saturating_sub(members.len());
        let mut devices: Vec<DeviceReport> = match more {
            0 => Vec::new(),
            more => self.enough_free(name, more, facts)?,
        };
        let present = members.iter().filter_map(|node| facts.nodes.get(node)).map(|fact| fact.device.clone());
        devices.extend(present);
        devices.truncate(nodes as usize);
        // Members that are not there just now count as those that are.
        if devices.len() == nodes as usize {
            could_hold(&self.config_of(&request, &model.record.card), &devices)
                .map_err(|problem| conflict(format!("{name} does not fit on {nodes} nodes: {problem}")))?;
        }
        if let Some(model) = self.models.get_mut(name) {
            model.record.request = request;
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, caller: Caller, name: &str, effects: &mut Vec<Effect>) {
        if self.opening.contains_key(name) {
            let refusal = conflict(format!("the files of {name} are still being read: try again shortly"));
            return effects.push(Effect::Reply(caller, Err(refusal)));
        }
        match self.models.get_mut(name) {
            None => {
                let refusal = self.unknown(name);
                effects.push(Effect::Reply(caller, Err(refusal)));
            }
            Some(model) => {
                model.record.removing = true;
                model.parting.clear();
                self.reply_once_stored(name, caller);
            }
        }
    }

    fn unknown(&self, name: &str) -> AdminFailure {
        let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
        let known =
            if known.is_empty() { "none is".to_owned() } else { format!("there are {}", known.join(", ")) };
        let shown: String = name.chars().take(128).collect();
        failure(AdminFailureKind::NotFound, format!("no model {shown} is deployed: {known}"))
    }
}

/// What is known of a model that is asked for.
enum Known {
    Deployed,
    Opening,
    Not,
}

fn check_nodes(nodes: u32) -> Checked<()> {
    match (1..=NODES_MAX).contains(&nodes) {
        true => Ok(()),
        false => Err(invalid(format!("`nodes` must be between 1 and {NODES_MAX}, not {nodes}"))),
    }
}

/// Whether what is fixed of the layout fits the number of nodes.
fn check_layout(request: &DeployModel) -> Checked<()> {
    check_nodes(request.nodes)?;
    let parts = [
        ("stages", request.stages),
        ("tensor_parallel_size", request.tensor_parallel_size),
        ("replicas", request.replicas),
    ];
    if let Some((part, _)) = parts.iter().find(|(_, size)| *size == Some(0)) {
        return Err(invalid(format!("`{part}` must be at least 1: leave it out for the default")));
    }
    let ranks: u64 = parts.iter().map(|(_, size)| u64::from(size.unwrap_or(1))).fold(1, u64::saturating_mul);
    if ranks > u64::from(request.nodes) {
        return Err(invalid(format!(
            "`nodes` must be at least {ranks}, one for each rank (stages × tensor_parallel_size × replicas), not {}",
            request.nodes
        )));
    }
    Ok(())
}
