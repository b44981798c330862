//! A world that somebody has in mind: it begins when the cluster serves, and ends when every request has.

use super::{Happening, World};
use crate::Violation;
use crate::gateway::{Gateway, Request};
use crate::node::Node;
use crate::plan::{FaultKind, Observed, Plan, PlanFailure, PlannedFault, ReplicaCut, Struck};
use crate::process::{Action, Input, Process, Timer};
use crate::random::Random;
use crate::scenario::{Fault, Scenario};
use ashlar_protocol::serving::ClusterSnapshot;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How often it is looked whether the cluster serves, or all is over.
const LOOK_US: u64 = 100_000;
/// A cluster that does not serve by then never will.
const OPEN_US_MAX: u64 = 3_600_000_000;
/// What a world goes on for after the last answer: until the last ends are announced.
const AFTERMATH_US: u64 = 2_000_000;
/// Beyond its deadline, a request may last so long: the scheduler may be just being started again.
const GRACE_US: u64 = 60_000_000;
/// Tokens of prompts are below this number.
const TOKENS: u64 = 500;

/// How far a planned run is.
#[derive(Default)]
pub(super) struct Course {
    /// When the scheduler sends what has become possible, if anything may have.
    pub(super) due_us: Option<u64>,
    /// When the cluster served.
    opened_us: Option<u64>,
    replicas: Vec<ReplicaCut>,
    struck: Vec<Struck>,
    events: u64,
}

impl World {
    /// The world of a plan.
    pub(crate) fn planned(plan: Arc<Plan>) -> World {
        let nodes = (0..plan.nodes.len()).map(|number| Node::planned(number, Arc::clone(&plan))).collect();
        let gateways = (0..plan.gateways).map(Gateway::logging).collect();
        let seed = plan.seed;
        let world = World::of(seed, Random::new(seed), Scenario::planned(plan), false);
        World { nodes, gateways, ..world }
    }

    /// Runs until every request has ended.
    ///
    /// # Errors
    /// The cluster never serves, or something happens that never must.
    pub(crate) fn run_plan(mut self, progress: &mut dyn FnMut(f64)) -> Result<Observed, PlanFailure> {
        let Some(plan) = self.scenario.plan.clone() else {
            return Err(PlanFailure::Settings("this world has no plan".into()));
        };
        let ended = self.follow(&plan, progress);
        ended.map_err(|stop| match stop {
            Stop::NeverServed(why) => PlanFailure::NeverServed(why),
            Stop::Violation(what) => {
                let (seed, at_us) = (self.seed, self.now_us);
                Violation { seed, at_us, what, trace: Vec::new() }.into()
            }
        })?;
        self.count_life();
        Ok(Observed {
            opened_us: self.course.opened_us.unwrap_or(self.now_us),
            ended_us: self.now_us,
            replicas: self.course.replicas,
            requests: self.gateways.iter().flat_map(|gateway| gateway.logs()).cloned().collect(),
            struck: self.course.struck,
            counters: self.report,
            events: self.course.events,
        })
    }

    fn follow(&mut self, plan: &Plan, progress: &mut dyn FnMut(f64)) -> Result<(), Stop> {
        self.start_all();
        let mut faults = plan.faults.iter().copied().peekable();
        let (mut look_us, mut end_us) = (0, u64::MAX);
        loop {
            let next_us = self.queue.first_key_value().map_or(u64::MAX, |((at, _), _)| *at);
            let fault_us = match (self.course.opened_us, faults.peek()) {
                (Some(opened), Some(fault)) => opened + fault.at_us,
                _ => u64::MAX,
            };
            let due_us = self.course.due_us.unwrap_or(u64::MAX);
            let at_us = next_us.min(fault_us).min(due_us);
            if at_us >= end_us || at_us == u64::MAX {
                break;
            }
            self.now_us = at_us;
            if at_us >= look_us {
                look_us = at_us + LOOK_US;
                match self.course.opened_us {
                    None => self.open(plan)?,
                    Some(opened) => {
                        let share = (at_us - opened) as f64 / plan.last_arrival_us().max(1) as f64;
                        progress(share.min(1.0));
                        if end_us == u64::MAX && self.all_have_ended(plan, opened)? {
                            end_us = at_us + AFTERMATH_US;
                        }
                    }
                }
            }
            self.course.events += 1;
            if due_us == at_us {
                self.send_steps()?;
            } else if fault_us == at_us {
                faults.next().into_iter().for_each(|fault| self.strike_planned(plan, fault));
            } else if let Some((_, happening)) = self.queue.pop_first() {
                self.happen(happening)?;
            }
        }
        self.verify_plan_end()
    }

    /// Once every replica serves, requests begin to arrive.
    fn open(&mut self, plan: &Plan) -> Result<(), Stop> {
        let snapshot = self.scheduler.director.snapshot();
        let serves = !snapshot.replicas.is_empty() && snapshot.replicas.iter().all(|replica| replica.ready);
        if !serves || self.gateways.iter().any(|gateway| !gateway.is_connected()) {
            let problem = snapshot.problem.filter(|_| snapshot.replicas.is_empty());
            let present = snapshot.nodes.len() == plan.nodes.len();
            return match problem {
                // Everybody is there, and has had time to tell.
                Some(problem) if present && self.now_us > 10_000_000 => Err(Stop::NeverServed(problem)),
                _ if self.now_us > OPEN_US_MAX => Err(Stop::NeverServed("after an hour it did not".into())),
                _ => Ok(()),
            };
        }
        let opened = self.now_us;
        self.course.opened_us = Some(opened);
        self.course.replicas = cuts(&snapshot);
        for (number, traced) in plan.requests.iter().enumerate() {
            let mut random = Random::new(plan.seed ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let prompt = (0..traced.prompt_tokens).map(|_| random.between(0, TOKENS) as u32).collect();
            let arrival_us = opened + traced.at_us;
            let request = Request::plain(arrival_us, prompt, traced.output_tokens, plan.limits.deadline_ms);
            let at = number % self.gateways.len();
            let index = self.gateways[at].expect(request);
            let (process, incarnation) = (Process::Gateway(at), self.life(Process::Gateway(at)).incarnation);
            let input = Input::Timer(Timer::Arrival(index)).into();
            self.push(arrival_us, Happening::To { process, incarnation, over: None, input });
        }
        Ok(())
    }

    fn all_have_ended(&self, plan: &Plan, opened: u64) -> Result<bool, Stop> {
        let last_us = opened + plan.last_arrival_us();
        if self.now_us < last_us {
            return Ok(false);
        }
        let mut requests = self.gateways.iter().flat_map(|gateway| gateway.logs());
        let ended = requests.all(|log| log.ended.is_some());
        if !ended && self.now_us > last_us + 1_000 * plan.limits.deadline_ms + GRACE_US {
            return Err(Stop::Violation("a request never ended".into()));
        }
        Ok(ended)
    }

    /// The scheduler sends what has become possible with everything that has reached it.
    fn send_steps(&mut self) -> Result<(), String> {
        self.course.due_us = None;
        let life = self.life(Process::Scheduler);
        if !life.alive {
            return Ok(());
        }
        if life.paused_until_us > self.now_us {
            self.course.due_us = Some(life.paused_until_us);
            return Ok(());
        }
        let mut actions: Vec<Action> = Vec::new();
        self.scheduler.send_steps(self.now_us, &mut actions)?;
        actions.into_iter().for_each(|action| self.act(Process::Scheduler, action));
        Ok(())
    }

    fn strike_planned(&mut self, plan: &Plan, fault: PlannedFault) {
        self.course.struck.push(Struck { at_us: self.now_us, fault });
        self.report.faults += 1;
        let process = fault.process();
        self.strike(match fault.kind {
            FaultKind::Kill => Fault::Kill { process, for_us: plan.times.restart_us },
            FaultKind::Freeze { for_us } => Fault::Pause { process, for_us },
        });
    }

    /// Nothing is left of what has ended.
    fn verify_plan_end(&mut self) -> Result<(), Stop> {
        self.scheduler.check()?;
        let engine = self.scheduler.director.engine();
        if self.course.opened_us.is_none() {
            let problem = self.scheduler.director.snapshot().problem;
            return Err(Stop::NeverServed(problem.unwrap_or_else(|| "nothing happens any more".into())));
        }
        if !engine.is_idle() {
            return Err(Stop::Violation(
                "the engine still has sequences although all requests have ended".into(),
            ));
        }
        for replica in self.scheduler.director.snapshot().replicas {
            let held = engine.replica(replica.replica).map_or(0, |replica| replica.pool.held());
            if held > 0 {
                return Err(Stop::Violation(format!("{held} blocks are held by nobody")));
            }
        }
        Ok(())
    }
}

/// Why a run ends early.
enum Stop {
    NeverServed(String),
    Violation(String),
}

impl From<String> for Stop {
    fn from(what: String) -> Stop {
        Stop::Violation(what)
    }
}

/// How every replica is cut.
fn cuts(snapshot: &ClusterSnapshot) -> Vec<ReplicaCut> {
    let mut cuts: BTreeMap<_, ReplicaCut> = BTreeMap::new();
    for replica in &snapshot.replicas {
        let (stages, kv_blocks) = (Vec::new(), replica.kv_blocks.0);
        cuts.insert(replica.replica, ReplicaCut { stages, ranks: 1, kv_blocks });
    }
    for node in &snapshot.nodes {
        let Some((replica, stage, rank)) = node.place else { continue };
        let Some(cut) = cuts.get_mut(&replica) else { continue };
        let stage = stage.0 as usize;
        if cut.stages.len() <= stage {
            cut.stages.resize(stage + 1, (0, 0));
        }
        cut.stages[stage] = (node.layers.start, node.layers.end);
        cut.ranks = cut.ranks.max(rank.0 as usize + 1);
    }
    cuts.into_values().collect()
}
