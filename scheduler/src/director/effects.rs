//! From what one core wants done to outputs, and to events of the other cores.

use super::{Director, Output, Wish};
use crate::adapters::{self, Caller};
use crate::audit;
use crate::cluster::{self, NodeConnection};
use crate::engine::{self, GatewayId};
use crate::time::Millis;
use crate::{jobs, responses};
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind, AdminReply};
use ashlar_protocol::membership::{Assignment, ToNode};
use ashlar_protocol::serving::FromScheduler;
use ashlar_protocol::step::Boundary;
use ashlar_vocabulary::{Bytes, LayerRange};

impl Director {
    fn response_effect(&mut self, now: Millis, effect: responses::Effect, outputs: &mut Vec<Output>) {
        use responses::Effect;
        match effect {
            Effect::Submit(submit) => {
                self.engine_event(now, engine::Event::Submit { gateway: GatewayId::KEPT, submit });
            }
            Effect::Cancel(id) => {
                self.engine_event(now, engine::Event::Cancel { gateway: GatewayId::KEPT, id });
            }
            Effect::ToGateway(gateway, message) => {
                outputs.push(Output::ToGateway(gateway, Box::new(message)));
            }
            Effect::Reply { gateway, call, reply } => {
                let reply = Box::new(reply.unwrap_or_else(AdminReply::Refused));
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Admin { call, reply })));
            }
            Effect::Persist { id, record } => outputs.push(Output::PersistResponse(id, record)),
        }
    }

    fn audit_effect(&mut self, now: Millis, effect: audit::Effect, outputs: &mut Vec<Output>) {
        match effect {
            audit::Effect::Repeat { audit, replica, submit, logits_from } => {
                self.engine_event(now, engine::Event::Repeat { audit, replica, submit, logits_from });
            }
            audit::Effect::Found(finding) => {
                if let Some((replica, revision)) = finding.wrong {
                    let start = finding.same_until_layer as usize;
                    let end = match finding.boundary {
                        Boundary::Layers(layers) => layers as usize,
                        Boundary::Logits => start,
                    };
                    let layers = LayerRange { start, end };
                    self.cluster_event(now, cluster::Event::Differs { replica, revision, layers });
                }
                outputs.push(Output::Differ(finding));
            }
        }
    }

    fn adapter_effect(&mut self, now: Millis, effect: adapters::Effect, outputs: &mut Vec<Output>) {
        use adapters::Effect;
        match effect {
            Effect::Load { replica, ranks, revision, adapter, load } => {
                // From now on it has its room, as far as its size is known.
                self.tell_adapters_held(now, replica);
                let order = ToNode::LoadAdapter { revision, adapter, load };
                outputs.push(Output::ToNodes(ranks, Box::new(order)));
            }
            Effect::Unload { ranks, adapter } => {
                outputs.push(Output::ToNodes(ranks, Box::new(ToNode::UnloadAdapter { adapter })));
            }
            Effect::Resident { replica, adapter } => {
                self.tell_adapters_held(now, replica);
                self.engine_event(now, engine::Event::AdapterResident { replica, adapter });
            }
            Effect::Gone { replica, adapter } => {
                self.tell_adapters_held(now, replica);
                self.engine_event(now, engine::Event::AdapterGone { replica, adapter });
            }
            Effect::Failed { replica, adapter, reason } => {
                self.tell_adapters_held(now, replica);
                self.engine_event(now, engine::Event::AdapterFailed { replica, adapter, reason });
            }
            Effect::Known(adapters) => self.engine_event(now, engine::Event::AdaptersKnown(adapters)),
            Effect::Persist { name, record } => outputs.push(Output::PersistAdapter(name, record)),
            Effect::Published => outputs.push(Output::Snapshot),
            Effect::Reply(Caller::Gateway { gateway, call }, reply) => {
                let message = FromScheduler::Admin { call, reply: Box::new(reply) };
                outputs.push(Output::ToGateway(gateway, Box::new(message)));
            }
            Effect::Reply(Caller::Job(number), reply) => {
                let Some(wish) = self.wishes.remove(&number) else { return };
                self.job_event(now, granted(wish, reply));
            }
        }
    }

    /// Turns effects into outputs and into events of the other cores, until no core wants anything more.
    pub(super) fn settle(&mut self, now: Millis, outputs: &mut Vec<Output>) {
        while !(self.engine_effects.is_empty()
            && self.cluster_effects.is_empty()
            && self.adapter_effects.is_empty()
            && self.response_effects.is_empty()
            && self.audit_effects.is_empty()
            && self.job_effects.is_empty())
        {
            for effect in std::mem::take(&mut self.audit_effects) {
                self.audit_effect(now, effect, outputs);
            }
            for effect in std::mem::take(&mut self.response_effects) {
                self.response_effect(now, effect, outputs);
            }
            for effect in std::mem::take(&mut self.job_effects) {
                self.job_effect(now, effect, outputs);
            }
            for effect in std::mem::take(&mut self.adapter_effects) {
                self.adapter_effect(now, effect, outputs);
            }
            for effect in std::mem::take(&mut self.engine_effects) {
                match effect {
                    engine::Effect::SendStep { replica, plan } => {
                        let connections = self.cluster.connections_of(replica);
                        outputs.push(Output::ToNodes(connections, Box::new(ToNode::Step(plan))));
                    }
                    engine::Effect::Audit(event) => self.audit_event(event),
                    engine::Effect::ToGateway { gateway: GatewayId::AUDITOR, .. } => {}
                    engine::Effect::ToGateway { gateway: GatewayId::KEPT, message } => {
                        self.response_event(now, responses::Event::Said(message));
                    }
                    engine::Effect::ToGateway { gateway, message } => {
                        outputs.push(Output::ToGateway(gateway, Box::new(message)));
                    }
                    engine::Effect::WantAdapter { replica, adapter } => {
                        self.adapter_event(now, adapters::Event::Wanted { replica, adapter });
                    }
                    engine::Effect::ReplicaFault { replica, revision, reason } => {
                        self.cluster_event(now, cluster::Event::ReplicaFault { replica, revision, reason });
                    }
                }
            }
            for effect in std::mem::take(&mut self.cluster_effects) {
                match effect {
                    cluster::Effect::Assign { connection, assignment } => {
                        outputs.push(Output::ToNodes(vec![connection], Box::new(ToNode::Assign(assignment))));
                    }
                    cluster::Effect::Release { connection, revision } => {
                        let release = ToNode::Release { revision };
                        outputs.push(Output::ToNodes(vec![connection], Box::new(release)));
                    }
                    cluster::Effect::Prepare { connection, order } => {
                        self.prepare(now, connection, order, outputs);
                    }
                    cluster::Effect::Quarantined { node, reason } => {
                        outputs.push(Output::Quarantined(node, reason));
                    }
                    cluster::Effect::Dismiss { connection } => {
                        outputs.push(Output::ToNodes(vec![connection], Box::new(ToNode::Dismissed)));
                    }
                    cluster::Effect::ReplicaDrains { replica, drains } => {
                        self.engine_event(now, engine::Event::ReplicaDrains { replica, drains });
                    }
                    cluster::Effect::Disconnect { connection, reason } => {
                        outputs.push(Output::CloseNode(connection, reason));
                    }
                    cluster::Effect::ReplicaUp(up) => {
                        outputs.push(Output::Up(up.clone()));
                        if let Some(replica) = self.cluster.training_replica(up.replica) {
                            self.job_event(now, jobs::Event::ReplicaUp(replica));
                        }
                        let (replica, revision) = (up.replica, up.revision);
                        let ranks = self.cluster.connections_of(replica);
                        self.engine_event(now, engine::Event::ReplicaUp(up));
                        self.audit_event(audit::Event::ReplicaUp { replica });
                        self.adapter_event(now, adapters::Event::ReplicaUp { replica, revision, ranks });
                    }
                    cluster::Effect::ReplicaDown { replica, reason } => {
                        outputs.push(Output::Down(replica, reason.clone()));
                        let down = jobs::Event::ReplicaDown { replica, reason: reason.clone() };
                        self.job_event(now, down);
                        self.engine_event(now, engine::Event::ReplicaDown { replica, reason });
                        self.audit_event(audit::Event::ReplicaDown { replica });
                        self.adapter_event(now, adapters::Event::ReplicaDown { replica });
                    }
                    cluster::Effect::ReplicaCrashed { replica, reason } => {
                        self.engine_event(now, engine::Event::ReplicaCrashed { replica, reason });
                    }
                    cluster::Effect::Problem { problem, lasting } => {
                        outputs.push(Output::Problem(problem.clone()));
                        self.engine_event(now, engine::Event::Problem { problem, lasting });
                    }
                    cluster::Effect::Fenced { by } => outputs.push(Output::Fenced(by)),
                }
            }
        }
    }

    /// Has a slice prepared where there is room for it beside everything else that is reserved there.
    fn prepare(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        order: Option<(Box<Assignment>, Bytes)>,
        outputs: &mut Vec<Output>,
    ) {
        if let Some((assignment, weights)) = &order {
            let adapters = self.cluster.place_of(connection).map(|(replica, _)| self.adapters.held(replica));
            let taken = self.jobs.reserved_on(connection) + adapters.unwrap_or(Bytes(0)) + *weights;
            if taken > self.cluster.room_of(connection) {
                let revision = assignment.revision;
                let event = cluster::Event::Prepared { connection, revision, outcome: Ok(()) };
                return self.cluster_event(now, event);
            }
        }
        let order = ToNode::Prepare(order.map(|(assignment, _)| assignment));
        outputs.push(Output::ToNodes(vec![connection], Box::new(order)));
    }

    /// Numbers what a job wants, and remembers it until it is answered.
    fn wish(&mut self, wish: Option<Wish>) -> Caller {
        self.wishes_made += 1;
        if let Some(wish) = wish {
            self.wishes.insert(self.wishes_made, wish);
        }
        Caller::Job(self.wishes_made)
    }

    fn job_effect(&mut self, now: Millis, effect: jobs::Effect, outputs: &mut Vec<Output>) {
        match effect {
            jobs::Effect::ToNodes(connections, message) => {
                outputs.push(Output::ToNodes(connections, message));
            }
            jobs::Effect::Reply { gateway, call, reply } => {
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Admin { call, reply })));
            }
            jobs::Effect::Prepare { gateway, job } => {
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Prepare(job))));
            }
            jobs::Effect::Publish(load) => {
                let caller = self.wish(Some(Wish::Publish(load.name.clone())));
                self.adapter_event(now, adapters::Event::Load(caller, load));
            }
            jobs::Effect::StoreCandidate { job, load } => {
                let caller = self.wish(Some(Wish::Store(job)));
                self.adapter_event(now, adapters::Event::Load(caller, load));
            }
            jobs::Effect::Promote { job, name, generation: to_generation, expected_generation } => {
                let caller = self.wish(Some(Wish::Promote(job)));
                let expected_generation = Some(expected_generation);
                let event = adapters::Event::RollBack { caller, name, to_generation, expected_generation };
                self.adapter_event(now, event);
            }
            jobs::Effect::Compare { gateway, name, mut compare } => {
                compare.served = self.adapters.served(&name).map(|view| (view.generation, view.adapter));
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Compare(compare))));
            }
            jobs::Effect::Withdraw(name) => {
                let caller = self.wish(None);
                self.adapter_event(now, adapters::Event::Unload { caller, name, expected_generation: None });
            }
            jobs::Effect::Sweep(mut references) => {
                references.adapters.extend(self.adapters.referenced());
                references.blobs.extend(self.responses.referenced());
                outputs.push(Output::Jobs(Box::new(jobs::Effect::Sweep(references))));
            }
            other => outputs.push(Output::Jobs(Box::new(other))),
        }
    }
}

/// What the jobs' core hears of the answer to a wish.
fn granted(wish: Wish, reply: AdminReply) -> jobs::Event {
    match (wish, reply) {
        (Wish::Publish(name), AdminReply::Refused(failure)) => jobs::Event::NotPublished { name, failure },
        (Wish::Publish(name), _) => jobs::Event::Published { name },
        (Wish::Store(job), AdminReply::Adapter(view)) => {
            jobs::Event::CandidateStored { job, outcome: Ok(view.generation) }
        }
        (Wish::Store(job), AdminReply::Refused(failure)) => {
            jobs::Event::CandidateStored { job, outcome: Err(failure) }
        }
        (Wish::Store(job), _) => {
            let message = "no generation was made of it".to_owned();
            let failure = AdminFailure { kind: AdminFailureKind::Internal, message };
            jobs::Event::CandidateStored { job, outcome: Err(failure) }
        }
        (Wish::Promote(job), AdminReply::Refused(failure)) => {
            jobs::Event::Promoted { job, outcome: Err(failure) }
        }
        (Wish::Promote(job), _) => jobs::Event::Promoted { job, outcome: Ok(()) },
    }
}
