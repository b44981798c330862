//! An engine, one or more replicas of model ranks behind it, and virtual time.

use crate::rank::Rank;
use ashlar_protocol::serving::{ChoiceId, FinishReason, FromScheduler, Receipt, RequestFailure, Submit};
use ashlar_protocol::step::{StageRange, StepPlan, StepResult};
use ashlar_scheduler::audit;
pub(crate) use ashlar_scheduler::engine::EngineConfig;
use ashlar_scheduler::engine::{Effect, Engine, Event, GatewayId, LostBlocks, ReplicaUp, StageCost};
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{
    AdapterId, LeaseTerm, ModelDigest, ReplicaId, ReplicaRevision, RequestId, SamplingParams, StageIndex,
    TokenId,
};
use std::collections::{BTreeMap, VecDeque};

pub(crate) const GATEWAY: GatewayId = GatewayId(1);
pub(crate) const DIGEST: ModelDigest = ModelDigest([7; 32]);

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    Finished(FinishReason, Receipt),
    Failed(RequestFailure),
}

/// What a gateway has received of a choice.
#[derive(Debug, Default, Clone)]
pub(crate) struct Heard {
    pub(crate) indices: Vec<u32>,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_logprobs: Vec<u32>,
    pub(crate) end: Option<End>,
    pub(crate) first_token_at: u64,
}

pub(crate) struct Replica {
    pub(crate) rank: Rank,
    /// When each stage is free again.
    stages: Vec<u64>,
    results: VecDeque<(u64, StepResult)>,
    pub(crate) plans: Vec<StepPlan>,
    pub(crate) in_flight_most: usize,
    pub(crate) alive: bool,
}

pub(crate) struct World {
    pub(crate) engine: Engine,
    pub(crate) now: u64,
    pub(crate) replicas: BTreeMap<u32, Replica>,
    pub(crate) heard: BTreeMap<ChoiceId, Heard>,
    pub(crate) faults: Vec<String>,
    /// What was said of audited sequences.
    pub(crate) audits: Vec<audit::Event>,
    /// Adapters that were asked for, by replica.
    pub(crate) wants: Vec<(u32, AdapterId)>,
    /// Time of a stage for a step of this many rows.
    pub(crate) stage_ms: fn(usize) -> u64,
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        audit_per_million: 0,
        vocab_size: u32::MAX,
        enable_prefix_caching: true,
        model_digest: DIGEST,
        max_context_tokens: 2048,
        max_num_seqs: 16,
        max_num_batched_tokens: 256,
        step_target_ms: 100,
        queue_max: 64,
        queue_wait_ms_max: 1_000_000,
        deadline_default_ms: 1_000_000,
        repair_patience_ms: 30_000,
    }
}

pub(crate) fn choice(number: u128) -> ChoiceId {
    ChoiceId { request: RequestId(number), choice: 0 }
}

pub(crate) fn prompt(len: usize, salt: u32) -> Vec<TokenId> {
    (0..len as u32).map(|at| (at * 31 + salt * 1009) % 997).collect()
}

pub(crate) fn submit(number: u128, prompt: Vec<TokenId>, max_new_tokens: u32) -> Submit {
    Submit {
        adapter: None,
        id: choice(number),
        model_digest: DIGEST,
        prompt,
        forced: Vec::new(),
        max_new_tokens,
        stop_tokens: Vec::new(),
        sampling: SamplingParams { seed: number as u64, ..SamplingParams::default() },
        tenant_salt: 0,
        charge: None,
        priority: 0,
        deadline_ms: 0,
        forced_logprobs: Vec::new(),
        kept: false,
        traceparent: None,
    }
}

impl World {
    pub(crate) fn new(config: EngineConfig) -> World {
        World {
            engine: Engine::new(config),
            now: 0,
            replicas: BTreeMap::new(),
            heard: BTreeMap::new(),
            faults: Vec::new(),
            audits: Vec::new(),
            wants: Vec::new(),
            stage_ms: |_| 10,
        }
    }

    /// One replica.
    pub(crate) fn with(config: EngineConfig, stages: usize, kv_blocks: u32) -> World {
        let mut world = World::new(config);
        world.up(0, stages, kv_blocks);
        world
    }

    pub(crate) fn up(&mut self, replica: u32, stages: usize, kv_blocks: u32) {
        self.up_with(replica, Rank::of(stages), (stages, kv_blocks), None);
    }

    /// Another node takes the place of a stage, which alone has lost its cache.
    pub(crate) fn replace(&mut self, replica: u32, stage: usize, (stages, kv_blocks): (usize, u32)) {
        let Some(Replica { rank, .. }) = self.replicas.remove(&replica) else { return };
        self.down(replica, "node b was lost");
        let rank = rank.without(stage);
        let stage = StageIndex(stage as u32);
        let lost = LostBlocks {
            stages: StageRange { first: stage, last: stage },
            blocks: rank.kept_but_by(stage.0 as usize),
        };
        self.up_with(replica, rank, (stages, kv_blocks), Some(lost));
    }

    fn up_with(
        &mut self,
        replica: u32,
        rank: Rank,
        (stages, kv_blocks): (usize, u32),
        lost: Option<LostBlocks>,
    ) {
        let state = Replica {
            rank,
            stages: vec![0; stages],
            results: VecDeque::new(),
            plans: Vec::new(),
            in_flight_most: 0,
            alive: true,
        };
        self.replicas.insert(replica, state);
        let cost = StageCost { weights_us: 5_000.0, row_us: 100.0, position_us: 0.01 };
        self.send(Event::ReplicaUp(ReplicaUp {
            replica: ReplicaId(replica),
            term: LeaseTerm(1),
            revision: ReplicaRevision(self.now + 1),
            kv_blocks,
            kept: Vec::new(),
            lost,
            stages: vec![cost; stages],
        }));
    }

    pub(crate) fn down(&mut self, replica: u32, reason: &str) {
        self.replicas.remove(&replica);
        self.send(Event::ReplicaDown { replica: ReplicaId(replica), reason: reason.to_owned() });
    }

    pub(crate) fn crash(&mut self, replica: u32, reason: &str) {
        self.replicas.remove(&replica);
        self.send(Event::ReplicaCrashed { replica: ReplicaId(replica), reason: reason.to_owned() });
    }

    pub(crate) fn submit(&mut self, submit: Submit) -> ChoiceId {
        let id = submit.id;
        self.send(Event::Submit { gateway: GATEWAY, submit: Box::new(submit) });
        id
    }

    pub(crate) fn send(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.engine.handle(Millis(self.now), event, &mut effects);
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::SendStep { replica, plan } => self.execute(replica.0, *plan),
                Effect::Audit(event) => self.audits.push(event),
                Effect::ToGateway { gateway: GatewayId::AUDITOR, .. } => {}
                Effect::ToGateway { gateway, message } => {
                    assert_eq!(gateway, GATEWAY);
                    self.hear(message);
                }
                Effect::WantAdapter { replica, adapter } => self.wants.push((replica.0, adapter)),
                Effect::ReplicaFault { reason, .. } => self.faults.push(reason),
            }
        }
        self.engine.check().expect("the engine is consistent");
    }

    fn execute(&mut self, replica: u32, plan: StepPlan) {
        let Some(state) = self.replicas.get_mut(&replica) else { return };
        let refilled = plan.refill.iter().flat_map(|refill| &refill.slices);
        let rows = plan.slices.iter().chain(refilled).map(|slice| slice.count as usize).sum();
        let mut time = self.now;
        for free in &mut state.stages {
            time = time.max(*free) + (self.stage_ms)(rows);
            *free = time;
        }
        let result = state.rank.execute(&plan);
        state.results.push_back((time, result));
        state.in_flight_most = state.in_flight_most.max(state.results.len());
        state.plans.push(plan);
    }

    fn hear(&mut self, message: FromScheduler) {
        let now = self.now;
        let id = match &message {
            FromScheduler::Token(token) => token.id,
            FromScheduler::PromptLogprobs { id, .. }
            | FromScheduler::Finished { id, .. }
            | FromScheduler::Failed { id, .. } => *id,
            _ => panic!("the engine speaks of choices alone"),
        };
        let heard = self.heard.entry(id).or_default();
        assert_eq!(heard.end, None, "nothing follows an end");
        match message {
            FromScheduler::Token(token) => {
                if heard.tokens.is_empty() {
                    heard.first_token_at = now;
                }
                heard.indices.push(token.index);
                heard.tokens.push(token.token);
            }
            FromScheduler::PromptLogprobs { position, logprobs, .. } => {
                heard.prompt_logprobs.extend((position..).take(logprobs.len()));
            }
            FromScheduler::Finished { reason, receipt, .. } => {
                heard.end = Some(End::Finished(reason, receipt))
            }
            FromScheduler::Failed { error, .. } => heard.end = Some(End::Failed(error)),
            _ => {}
        }
    }

    /// Delivers the next result; `false` if none is due.
    pub(crate) fn advance(&mut self) -> bool {
        let alive = self.replicas.iter().filter(|(_, state)| state.alive);
        let next = alive.filter_map(|(id, state)| Some((state.results.front()?.0, *id))).min();
        let Some((time, replica)) = next else { return false };
        let result = self.replicas.get_mut(&replica).and_then(|state| state.results.pop_front());
        self.now = self.now.max(time);
        if let Some((_, result)) = result {
            self.send(Event::StepResult { replica: ReplicaId(replica), result });
        }
        true
    }

    pub(crate) fn run(&mut self) {
        while self.advance() {}
    }

    pub(crate) fn wait(&mut self, ms: u64) {
        self.now += ms;
        self.send(Event::Tick);
    }

    pub(crate) fn replica(&mut self) -> &mut Replica {
        self.replicas.get_mut(&0).expect("replica 0 is up")
    }

    pub(crate) fn heard(&self, id: ChoiceId) -> Heard {
        self.heard.get(&id).cloned().unwrap_or_default()
    }

    pub(crate) fn receipt(&self, id: ChoiceId) -> Receipt {
        match self.heard(id).end {
            Some(End::Finished(_, receipt)) => receipt,
            other => panic!("{id:?} did not finish: {other:?}"),
        }
    }

    pub(crate) fn failure(&self, id: ChoiceId) -> RequestFailure {
        match self.heard(id).end {
            Some(End::Failed(failure)) => failure,
            other => panic!("{id:?} did not fail: {other:?}"),
        }
    }
}
