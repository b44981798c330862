//! What is durable: every record is written anew whenever it differs from what is stored, one write of a name at a time.

use super::events::{Caller, DeployedRecord, Effect, FleetRecord};
use super::{Fleet, OWN};
use crate::time::Millis;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use std::collections::BTreeSet;

/// Pause after a write that failed.
const RETRY_MS: u64 = 1_000;

/// What becomes of a record.
#[derive(Debug, Default, Clone)]
pub(super) struct Writing {
    stored: Option<FleetRecord>,
    /// What is being written.
    under_way: Option<Option<FleetRecord>>,
    retry_at: Millis,
    /// Who waits until what they wished is stored.
    pub(super) callers: Vec<Caller>,
}

impl Writing {
    /// Of what the store has.
    pub(super) fn stored(record: FleetRecord) -> Writing {
        Writing { stored: Some(record), ..Writing::default() }
    }
}

impl Fleet {
    /// What is stored of a model: what is wished beyond that is not done yet.
    pub(super) fn stored(&self, name: &str) -> Option<&DeployedRecord> {
        match self.writing.get(name)?.stored.as_ref()? {
            FleetRecord::Deployed(record) => Some(record),
            FleetRecord::Own { .. } => None,
        }
    }

    /// The nodes that the scheduler's own model is to have at most, as that is stored.
    pub(super) fn stored_own_nodes(&self) -> Option<u32> {
        match self.writing.get(OWN)?.stored.as_ref()? {
            FleetRecord::Own { nodes } => Some(*nodes),
            FleetRecord::Deployed(_) => None,
        }
    }

    /// Answers a call once what it wished is stored.
    pub(super) fn reply_once_stored(&mut self, name: &str, caller: Caller) {
        self.writing.entry(name.to_owned()).or_default().callers.push(caller);
    }

    fn desired(&self, name: &str) -> Option<FleetRecord> {
        if name == OWN {
            return self.own_nodes.map(|nodes| FleetRecord::Own { nodes });
        }
        self.models.get(name).map(|model| FleetRecord::Deployed(Box::new(model.record.clone())))
    }

    /// Writes what differs; answers those whose wish is stored already.
    pub(super) fn persist(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let known = self.writing.keys().chain(self.models.keys()).cloned();
        let names: BTreeSet<String> = known.chain([OWN.to_owned()]).collect();
        for name in names {
            let desired = self.desired(&name);
            if desired.is_none() && !self.writing.contains_key(&name) {
                continue;
            }
            let writing = self.writing.entry(name.clone()).or_default();
            if writing.under_way.is_some() {
                continue;
            }
            if writing.stored == desired {
                let callers = std::mem::take(&mut writing.callers);
                if desired.is_none() {
                    self.writing.remove(&name);
                }
                answer(&name, callers, effects);
            } else if writing.retry_at <= now {
                writing.under_way = Some(desired.clone());
                effects.push(Effect::Persist(name, desired));
            }
        }
    }

    pub(super) fn persisted(
        &mut self,
        now: Millis,
        name: &str,
        outcome: Result<(), String>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(writing) = self.writing.get_mut(name) else { return };
        let Some(written) = writing.under_way.take() else { return };
        match outcome {
            Ok(()) => {
                writing.stored = written.clone();
                // Who its nodes are may have changed meanwhile; nobody waits for that.
                if same_wish(written.as_ref(), self.desired(name).as_ref()) {
                    let callers =
                        self.writing.get_mut(name).map(|writing| std::mem::take(&mut writing.callers));
                    answer(name, callers.unwrap_or_default(), effects);
                }
            }
            Err(reason) => {
                writing.retry_at = now.plus(RETRY_MS);
                let (stored, callers) = (writing.stored.clone(), std::mem::take(&mut writing.callers));
                let message = format!("this cannot be stored ({reason}), and is not done: try again shortly");
                for caller in callers {
                    let failure =
                        AdminFailure { kind: AdminFailureKind::Unavailable, message: message.clone() };
                    effects.push(Effect::Reply(caller, Err(failure)));
                }
                self.take_back(name, stored);
            }
        }
    }

    /// What could not be stored is not wished for any more.
    fn take_back(&mut self, name: &str, stored: Option<FleetRecord>) {
        match stored {
            Some(FleetRecord::Own { nodes }) => self.own_nodes = Some(nodes),
            Some(FleetRecord::Deployed(record)) => {
                if let Some(model) = self.models.get_mut(name) {
                    (model.record.request, model.record.removing) = (record.request, record.removing);
                }
            }
            None if name == OWN => self.own_nodes = None,
            None => {
                self.models.remove(name);
            }
        }
    }
}

fn same_wish(written: Option<&FleetRecord>, desired: Option<&FleetRecord>) -> bool {
    match (written, desired) {
        (Some(FleetRecord::Deployed(written)), Some(FleetRecord::Deployed(desired))) => {
            (&written.request, written.removing) == (&desired.request, desired.removing)
        }
        (written, desired) => written == desired,
    }
}

fn answer(name: &str, callers: Vec<Caller>, effects: &mut Vec<Effect>) {
    let model = Some(name).filter(|name| *name != OWN).map(str::to_owned);
    effects.extend(callers.into_iter().map(|caller| Effect::Reply(caller, Ok(model.clone()))));
}
