//! A scheduler that speaks the real protocol and answers from scripts.

use crate::admin::Admin;
use crate::world::EOS;
use ashlar_protocol::access::{KeyRecord, Quota};
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::frame;
use ashlar_protocol::models::ModelsView;
use ashlar_protocol::serving::{
    ChoiceId, ClusterSnapshot, CompareAdapters, FailureKind, FinishReason, FromScheduler, NodeView, Receipt,
    ReplicaView, RequestFailure, SCHEDULER_BEAT_MS, SchedulerCounters, Submit, ToScheduler, TokenEvent,
};
use ashlar_protocol::step::StepTiming;
use ashlar_protocol::training::TrainingTiming;
use ashlar_vocabulary::{
    Bytes, JobId, LayerRange, LeaseTerm, ModelDigest, NodeId, ReplicaId, ReplicaRevision, StageIndex, Tenant,
    TensorRank, TokenId, TokenLogprob, TokenLogprobs,
};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};

pub(crate) const CONTEXT: u32 = 4096;

/// What to do for one submission, in order.
pub(crate) type Script = Vec<Action>;

#[derive(Debug, Clone)]
pub(crate) enum Action {
    /// The next token.
    Token(TokenId),
    /// A token event with this index.
    TokenAt(u32, TokenId),
    /// Log-probabilities of prompt positions 1 to the end.
    PromptLogprobs,
    /// Wait until the gate opens.
    Gate,
    /// Let other tasks run.
    Yield,
    /// What is left of limits.
    Quota(Quota),
    /// Tokens for ever.
    Flood(TokenId),
    Finish(FinishReason),
    Fail(FailureKind, &'static str),
    /// Cut the connection.
    Disconnect,
    /// Say nothing more over this connection, and keep it.
    Mute,
    /// Show the cluster as led in this term.
    Lead(u64),
}

/// Says `text`, then stops.
pub(crate) fn say(text: &str) -> Script {
    let mut script: Script = text.bytes().map(|byte| Action::Token(u32::from(byte))).collect();
    script.extend([Action::Token(EOS), Action::Finish(FinishReason::Stop)]);
    script
}

/// Says `text` and is cut off.
pub(crate) fn say_until_length(text: &str) -> Script {
    let mut script: Script = text.bytes().map(|byte| Action::Token(u32::from(byte))).collect();
    script.push(Action::Finish(FinishReason::Length));
    script
}

/// To one gateway.
#[derive(Debug)]
enum Out {
    Say(Box<FromScheduler>),
    /// Nothing more, and the connection stays.
    Mute,
    Cut,
}

impl Out {
    fn say(message: FromScheduler) -> Out {
        Out::Say(Box::new(message))
    }
}

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) submits: Vec<Submit>,
    pub(crate) cancels: Vec<ChoiceId>,
    pub(crate) refusals: Vec<LeaseTerm>,
    /// For whom administrative calls were, in order.
    pub(crate) tenants: Vec<Option<Tenant>>,
}

type Scripts = Arc<dyn Fn(&Submit) -> Script + Send + Sync>;

#[derive(Clone)]
pub(crate) struct FakeScheduler {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    scripts: Scripts,
    seen: Mutex<Seen>,
    admin: Mutex<Admin>,
    /// To every gateway.
    gateways: Mutex<Vec<mpsc::Sender<Out>>>,
    changed: Notify,
    gate: watch::Sender<bool>,
    cluster: watch::Sender<ClusterSnapshot>,
}

impl FakeScheduler {
    pub(crate) async fn start(scripts: impl Fn(&Submit) -> Script + Send + Sync + 'static) -> FakeScheduler {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            scripts: Arc::new(scripts),
            seen: Mutex::default(),
            admin: Mutex::default(),
            gateways: Mutex::default(),
            changed: Notify::new(),
            gate: watch::Sender::new(false),
            cluster: watch::Sender::new(cluster()),
        });
        let scheduler = FakeScheduler { address, state: state.clone() };
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, state.clone()));
            }
        });
        scheduler
    }

    pub(crate) fn open_gate(&self) {
        self.state.gate.send_replace(true);
    }

    pub(crate) fn change_cluster(&self, change: impl FnOnce(&mut ClusterSnapshot)) {
        self.state.cluster.send_modify(change);
    }

    pub(crate) fn submits(&self) -> Vec<Submit> {
        self.state.seen.lock().unwrap().submits.clone()
    }

    /// Looks at files and jobs, or changes them.
    pub(crate) fn admin<T>(&self, with: impl FnOnce(&mut Admin) -> T) -> T {
        with(&mut self.state.admin.lock().unwrap())
    }

    /// Waits until `condition` holds of files and jobs.
    pub(crate) async fn until_admin(&self, condition: impl Fn(&Admin) -> bool) {
        loop {
            let changed = self.state.changed.notified();
            if condition(&self.state.admin.lock().unwrap()) {
                return;
            }
            changed.await;
        }
    }

    /// Asks every gateway to validate a job's files.
    pub(crate) async fn prepare(&self, job: JobId) {
        let prepare = Box::new(self.admin(|admin| admin.prepare(job)));
        let gateways = self.state.gateways.lock().unwrap().clone();
        for gateway in gateways {
            let _ = gateway.send(Out::say(FromScheduler::Prepare(prepare.clone()))).await;
        }
    }

    /// Tells every gateway of the models beside its own.
    pub(crate) async fn tell_models(&self, models: ModelsView) {
        let gateways = self.state.gateways.lock().unwrap().clone();
        for gateway in gateways {
            let _ = gateway.send(Out::say(FromScheduler::Models(Box::new(models.clone())))).await;
        }
    }

    /// Tells every gateway, now and later, which keys are let in.
    pub(crate) async fn tell_keys(&self, keys: Vec<KeyRecord>) {
        self.admin(|admin| admin.keys = keys.clone());
        let gateways = self.state.gateways.lock().unwrap().clone();
        for gateway in gateways {
            let _ = gateway.send(Out::say(FromScheduler::Keys(keys.clone()))).await;
        }
    }

    /// For whom administrative calls were, in order.
    pub(crate) fn tenants(&self) -> Vec<Option<Tenant>> {
        self.state.seen.lock().unwrap().tenants.clone()
    }

    /// Asks every gateway to compare an adapter with what is served.
    pub(crate) async fn compare(&self, asked: &CompareAdapters) {
        let gateways = self.state.gateways.lock().unwrap().clone();
        for gateway in gateways {
            let _ = gateway.send(Out::say(FromScheduler::Compare(Box::new(asked.clone())))).await;
        }
    }

    /// Waits until `condition` holds of what was seen.
    pub(crate) async fn until(&self, condition: impl Fn(&Seen) -> bool) {
        loop {
            let changed = self.state.changed.notified();
            if condition(&self.state.seen.lock().unwrap()) {
                return;
            }
            changed.await;
        }
    }
}

async fn serve(mut socket: TcpStream, state: Arc<State>) {
    if frame::greet(&mut socket, "scheduler").await.is_err() {
        return;
    }
    let (mut read, mut write) = socket.into_split();
    let (sender, mut outbox) = mpsc::channel(64);
    let writer = tokio::spawn(async move {
        let mut mute = false;
        while let Some(out) = outbox.recv().await {
            match out {
                Out::Cut => return,
                Out::Mute => mute = true,
                Out::Say(_) if mute => {}
                Out::Say(message) => {
                    if frame::write(&mut write, &*message).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    state.gateways.lock().unwrap().push(sender.clone());
    let keys = state.admin.lock().unwrap().keys.clone();
    let _ = sender.send(Out::say(FromScheduler::Keys(keys))).await;
    let snapshots = sender.clone();
    let mut cluster = state.cluster.subscribe();
    let watcher = tokio::spawn(async move {
        loop {
            let snapshot = Box::new(cluster.borrow_and_update().clone());
            if snapshots.send(Out::say(FromScheduler::Cluster(snapshot))).await.is_err() {
                return;
            }
            let beat = Duration::from_millis(SCHEDULER_BEAT_MS / 2);
            while !cluster.has_changed().unwrap_or(true) {
                if tokio::time::timeout(beat, cluster.changed()).await.is_ok() {
                    cluster.mark_changed();
                } else if snapshots.send(Out::say(FromScheduler::Beat)).await.is_err() {
                    return;
                }
            }
        }
    });
    let mut plays = tokio::task::JoinSet::new();
    let mut running: Vec<(ChoiceId, tokio::task::AbortHandle)> = Vec::new();
    let reading = async {
        while let Ok(message) = frame::read::<ToScheduler>(&mut read).await {
            match message {
                ToScheduler::Submit(submit) => {
                    let script = (state.scripts)(&submit);
                    state.seen.lock().unwrap().submits.push((*submit).clone());
                    let play = play(*submit, script, sender.clone(), state.gate.subscribe());
                    let submit_id = state.seen.lock().unwrap().submits.last().unwrap().id;
                    running.push((submit_id, plays.spawn(play)));
                }
                ToScheduler::Admin { call, tenant, request } => {
                    state.seen.lock().unwrap().tenants.push(tenant);
                    let created = match &*request {
                        AdminRequest::CreateJob(request) => Some(request.id),
                        _ => None,
                    };
                    let reply = Box::new(state.admin.lock().unwrap().call(*request));
                    let prepare = created.filter(|_| matches!(*reply, AdminReply::Job(_)));
                    let keys = matches!(*reply, AdminReply::Key(_))
                        .then(|| state.admin.lock().unwrap().keys.clone());
                    if let Some(keys) = keys {
                        let _ = sender.send(Out::say(FromScheduler::Keys(keys))).await;
                    }
                    let _ = sender.send(Out::say(FromScheduler::Admin { call, reply })).await;
                    if let Some(job) = prepare {
                        let prepare = Box::new(state.admin.lock().unwrap().prepare(job));
                        let _ = sender.send(Out::say(FromScheduler::Prepare(prepare))).await;
                    }
                }
                ToScheduler::Prepared { job, outcome } => state.admin.lock().unwrap().prepared(job, *outcome),
                ToScheduler::Compared { job, outcome } => {
                    state.admin.lock().unwrap().compared.push((job, *outcome));
                }
                ToScheduler::Refused { term } => state.seen.lock().unwrap().refusals.push(term),
                ToScheduler::Cancel(id) => {
                    running.iter().filter(|(running, _)| *running == id).for_each(|(_, play)| play.abort());
                    state.seen.lock().unwrap().cancels.push(id);
                }
            }
            state.changed.notify_waiters();
        }
    };
    tokio::select! {
        () = reading => {}
        _ = writer => {}
    }
    watcher.abort();
}

async fn play(submit: Submit, script: Script, sender: mpsc::Sender<Out>, mut gate: watch::Receiver<bool>) {
    let id = submit.id;
    let mut index = submit.forced.len() as u32;
    let describe = |token: TokenId| {
        submit.sampling.top_logprobs.map(|top| TokenLogprobs {
            logprob: -0.5,
            top: (0..top)
                .map(|rank| TokenLogprob { token: (token + rank) % 256, logprob: -0.5 - rank as f32 })
                .collect(),
        })
    };
    for action in script {
        let message = match action {
            Action::Token(token) => {
                index += 1;
                let logprobs = describe(token);
                FromScheduler::Token(TokenEvent {
                    id,
                    index: index - 1,
                    token,
                    logprobs,
                    cached_tokens: 2,
                    queue_ms: 3,
                })
            }
            Action::TokenAt(index, token) => FromScheduler::Token(TokenEvent {
                id,
                index,
                token,
                logprobs: describe(token),
                cached_tokens: 2,
                queue_ms: 3,
            }),
            Action::PromptLogprobs => FromScheduler::PromptLogprobs {
                id,
                position: 1,
                logprobs: submit.prompt[1..].iter().filter_map(|token| describe(*token)).collect(),
            },
            Action::Gate => {
                gate.wait_for(|open| *open).await.unwrap();
                continue;
            }
            Action::Yield => {
                tokio::task::yield_now().await;
                continue;
            }
            Action::Flood(token) => loop {
                let event = TokenEvent { id, index, token, logprobs: None, cached_tokens: 2, queue_ms: 3 };
                if sender.send(Out::say(FromScheduler::Token(event))).await.is_err() {
                    return;
                }
                index += 1;
            },
            Action::Finish(reason) => {
                let receipt = Receipt {
                    prompt_tokens: submit.prompt.len() as u32,
                    cached_tokens: 2,
                    generated_tokens: index,
                    queue_ms: 3,
                    prefill_ms: 4,
                    decode_ms: 5,
                    preemptions: 0,
                    replays: 0,
                    stages: vec![StepTiming { compute_us: 7, ..StepTiming::default() }],
                };
                FromScheduler::Finished { id, reason, receipt }
            }
            Action::Quota(quota) => FromScheduler::Quota { id, quota },
            Action::Fail(kind, message) => {
                let error = RequestFailure { kind, message: message.into(), retry_after_ms: Some(2_500) };
                FromScheduler::Failed { id, error }
            }
            Action::Lead(term) => {
                FromScheduler::Cluster(Box::new(ClusterSnapshot { term: LeaseTerm(term), ..cluster() }))
            }
            Action::Mute => {
                let _ = sender.send(Out::Mute).await;
                return;
            }
            Action::Disconnect => {
                let _ = sender.send(Out::Cut).await;
                return;
            }
        };
        if sender.send(Out::say(message)).await.is_err() {
            return;
        }
    }
}

pub(crate) fn cluster() -> ClusterSnapshot {
    ClusterSnapshot {
        adapters: Vec::new(),
        term: LeaseTerm(3),
        model: "models/tiny".into(),
        model_digest: ModelDigest([0xab; 32]),
        max_context_tokens: CONTEXT,
        nodes: vec![NodeView {
            node: NodeId("a".into()),
            address: "10.0.0.1:7403".into(),
            threads: 2,
            isa: "avx2".into(),
            memory: Bytes(1 << 30),
            bandwidth_bytes_per_s: 1e9,
            flops_per_s: 1e9,
            place: Some((ReplicaId(0), StageIndex(0), TensorRank(0))),
            layers: LayerRange { start: 0, end: 4 },
            loaded: 1.0,
            leaving: false,
            quarantined: None,
            reserved: Bytes(1 << 20),
            ledger: [("weights".to_owned(), Bytes(1 << 19))].into(),
            adapters: Bytes(3 << 10),
            jobs: Bytes(5 << 10),
            resident: Bytes(1 << 19),
            busy: StepTiming {
                compute_us: 1_500_000,
                wait_us: 10,
                collective_us: 0,
                send_us: 5,
                sent_bytes: 9,
            },
            trained: TrainingTiming { compute_us: 2_500_000, wait_us: 20, exchange_us: 30, durable_us: 40 },
        }],
        replicas: vec![ReplicaView {
            replica: ReplicaId(0),
            revision: ReplicaRevision(1),
            ready: true,
            kv_blocks: (100, 25),
            steps: 7,
            hops_us: Vec::new(),
        }],
        problem: None,
        counters: SchedulerCounters { running: 2, steps: 10, scheduled_tokens: 80, ..Default::default() },
        holder: "10.0.0.1:7401/pid-1/started-2".into(),
        gateways: 1,
        requests: Vec::new(),
    }
}
