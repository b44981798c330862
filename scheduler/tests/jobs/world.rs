//! Everything around the jobs core, and what must hold whatever happens.

use crate::served::Served;
use ashlar_protocol::admin::{
    AdminReply, AdminRequest, DataReport, FileRecord, JobAction, JobEvent, JobEventKind, JobRecord,
    JobRequest, JobStatus, LoadAdapter, Page, PreparedJob,
};
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::training::{
    ExportedFile, LoraSettings, SessionStart, StepMetrics, TrainingMethod, TrainingReport, TrainingSettings,
    TrainingTiming, TrainingWork, ValidationData,
};
use ashlar_scheduler::cluster::NodeConnection;
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::jobs::{
    Effect, Event, Jobs, JobsConfig, Loaded, RankRoom, SaveId, StoredJob, TrainingRank, TrainingReplica,
};
use ashlar_scheduler::time::Millis;
use ashlar_shard_plan::{Piece, SessionRequest, SessionWeights, Shares};
use ashlar_vocabulary::{
    AdapterId, BlobId, Bytes, Decay, FileId, FloatType, HeadSlice, JobId, LayerRange, LayerVectors,
    LeaseTerm, ModelDigest, ModelShape, NodeId, ReplicaId, ReplicaRevision, Schedule, SessionId, StageIndex,
    Tenant, TensorRank, WeightType, WeightTypes,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(crate) const DIGEST: ModelDigest = ModelDigest([7; 32]);
pub(crate) const STAGES: u32 = 2;

/// The files of an adapter.
pub(crate) const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What outlives a scheduler.
#[derive(Default)]
pub(crate) struct Stored {
    pub(crate) files: BTreeMap<FileId, FileRecord>,
    pub(crate) jobs: BTreeMap<JobId, StoredJob>,
    pub(crate) events: BTreeMap<(JobId, u64), Vec<JobEvent>>,
    pub(crate) blobs: BTreeSet<BlobId>,
    pub(crate) down: bool,
    wishes: VecDeque<Effect>,
}

/// A rank's part of a session.
#[derive(Clone)]
struct Part {
    job: JobId,
    stage: u32,
    names_shares: bool,
    root: bool,
    /// Steps of its committed state, and whether the next one is prepared.
    steps: u64,
    prepared: bool,
}

#[derive(Default)]
struct Rank {
    parts: BTreeMap<SessionId, Part>,
    /// What it has said and the scheduler has not heard yet.
    said: VecDeque<(SessionId, TrainingReport)>,
}

pub(crate) struct World {
    pub(crate) jobs: Jobs,
    pub(crate) now: Millis,
    pub(crate) term: u64,
    pub(crate) max_jobs_running: usize,
    /// What nodes of new replicas offer beside what serves.
    pub(crate) memory: Bytes,
    /// What validation finds.
    pub(crate) longest_sample_rows: u32,
    pub(crate) stored: Stored,
    ranks: BTreeMap<NodeConnection, Rank>,
    pub(crate) up: BTreeMap<ReplicaId, TrainingReplica>,
    connections: u64,
    pub(crate) gateways: BTreeSet<GatewayId>,
    calls: u64,
    /// For whom calls are.
    pub(crate) tenant: Option<Tenant>,
    pub(crate) replies: BTreeMap<u64, AdminReply>,
    pub(crate) preparing: VecDeque<(GatewayId, JobId)>,
    pub(crate) publishing: VecDeque<LoadAdapter>,
    pub(crate) published: Vec<String>,
    /// What jobs of one name have come to that have to be better than what is served.
    pub(crate) served: Served,
    pub(crate) withdrawn: Vec<String>,
    pub(crate) deleted: Vec<BlobId>,
    /// What is still to be deleted.
    deletions: VecDeque<Effect>,
    /// What every rank was told to train with.
    pub(crate) opened: Vec<(JobId, TrainingSettings)>,
    /// How files are validated.
    pub(crate) settings: TrainingSettings,
    /// The validation losses that the root reports, by step; 1 where there is none.
    pub(crate) losses: BTreeMap<u64, f64>,
    pub(crate) skipped: bool,
    pub(crate) usable: Result<(), String>,
    /// Who takes part in each session, and who has voted for which step of it.
    members: BTreeMap<SessionId, (JobId, BTreeSet<NodeConnection>)>,
    votes: BTreeMap<(SessionId, u64), BTreeSet<NodeConnection>>,
    /// The highest step that was ever committed.
    committed: BTreeMap<JobId, u64>,
}

/// What a model is stored as.
pub(crate) const MODEL_FILES: [&str; 2] = ["config.json", "model.safetensors"];

pub(crate) fn settings() -> TrainingSettings {
    TrainingSettings {
        dataset: BlobId([9; 32]),
        validation: ValidationData::Split { examples: 1 },
        method: TrainingMethod::Supervised,
        lora: LoraSettings {
            rank: 8,
            alpha: 16.0,
            rank_stabilized: false,
            dropout: 0.0,
            targets: vec!["q_proj".into()],
        },
        full: None,
        epochs: 2,
        batch_size: 8,
        seed: 1,
        micro_batch_rows: 64,
        packing: true,
        keep_activations: true,
        learning_rate: 1e-4,
        schedule: Schedule { warmup_steps: 1, decay: Decay::Constant },
        adam: (0.9, 0.999, 1e-8),
        weight_decay: 0.0,
        norm_max: Some(1.0),
        steps: 6,
        steps_per_epoch: 3,
        evaluate_every: 2,
        patience: None,
    }
}

pub(crate) fn file(id: u128) -> FileRecord {
    FileRecord {
        id: FileId(id),
        name: format!("{id}.jsonl"),
        purpose: "fine-tune".into(),
        bytes: 100,
        created_at: 1_000 + id as u64,
        blob: BlobId([id as u8; 32]),
        owner: None,
    }
}

pub(crate) fn request(id: u128) -> JobRequest {
    JobRequest {
        id: JobId(id << 96),
        created_at: 2_000 + id as u64,
        model: "/models/demo".into(),
        model_digest: DIGEST,
        training_file: FileId(1),
        validation_file: None,
        suffix: Some("mine".into()),
        metadata: BTreeMap::new(),
        settings: "{}".into(),
        promote: None,
        owner: None,
        training_minutes_max: None,
    }
}

/// The share that a stage has of a job's state: the same bytes whoever computes it.
fn share(job: JobId, steps: u64, stage: u32) -> BlobId {
    let mut id = [0; 32];
    id[..16].copy_from_slice(&job.0.to_le_bytes());
    id[16..24].copy_from_slice(&steps.to_le_bytes());
    id[24..28].copy_from_slice(&stage.to_le_bytes());
    id[28] = 1;
    BlobId(id)
}

fn config(term: u64, max_jobs_running: usize) -> JobsConfig {
    JobsConfig {
        term: LeaseTerm(term),
        model_digest: DIGEST,
        shape: shape(),
        adapter_memory: ADAPTER_MEMORY,
        max_jobs_running,
        blobs: true,
    }
}

/// What adapters may take on a rank.
pub(crate) const ADAPTER_MEMORY: Bytes = Bytes(1 << 20);
/// What serving takes there.
pub(crate) const SERVING: Bytes = Bytes(5 << 20);

/// The model that is served.
pub(crate) fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 64,
        intermediate_size: 128,
        num_layers: 4 * STAGES as usize,
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 16,
        vocab_size: 256,
        max_position_embeddings: 512,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 4 * STAGES as usize),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

fn piece(stage: u32) -> Piece {
    let (start, last) = (stage as usize * 4, stage + 1 == STAGES);
    Piece {
        layers: LayerRange { start, end: start + 4 },
        first: stage == 0,
        last,
        rank: 0,
        tensor_parallel_size: 1,
        head: last.then_some(HeadSlice { index: 0, of: 1 }),
    }
}

/// What a session takes on each stage's rank.
pub(crate) fn session_bytes(settings: &TrainingSettings, keep_activations: bool, rows: u32) -> Vec<Bytes> {
    let (shape, request) = (
        shape(),
        SessionRequest {
            weights: SessionWeights::Adapter {
                rank: settings.lora.rank as usize,
                modules: &settings.lora.targets,
            },
            micro_batch_rows: rows as usize,
            keep_activations,
            replicas: 1,
            dropout: false,
        },
    );
    let shares = Shares::new(&shape, 1);
    let of = |stage: u32| piece(stage).session(&shares, (STAGES - stage - 1) as usize, 1, &request).total();
    (0..STAGES).map(of).collect()
}

impl World {
    /// A scheduler whose store is empty but for one file, a gateway, and `replicas` replicas.
    pub(crate) fn new(replicas: u32) -> World {
        let mut world = World {
            jobs: Jobs::new(config(1, 2)),
            now: Millis(0),
            term: 1,
            max_jobs_running: 2,
            memory: Bytes(1 << 40),
            longest_sample_rows: 8,
            stored: Stored::default(),
            ranks: BTreeMap::new(),
            up: BTreeMap::new(),
            connections: 0,
            gateways: BTreeSet::new(),
            calls: 0,
            tenant: None,
            replies: BTreeMap::new(),
            preparing: VecDeque::new(),
            publishing: VecDeque::new(),
            published: Vec::new(),
            served: Served::default(),
            withdrawn: Vec::new(),
            deleted: Vec::new(),
            deletions: VecDeque::new(),
            opened: Vec::new(),
            settings: settings(),
            losses: BTreeMap::new(),
            skipped: false,
            usable: Ok(()),
            members: BTreeMap::new(),
            votes: BTreeMap::new(),
            committed: BTreeMap::new(),
        };
        world.stored.files.insert(FileId(1), file(1));
        world.event(Event::WallClock(5_000));
        world.load();
        world.gateway_up(1);
        (0..replicas).for_each(|replica| world.replica_up(replica));
        world
    }

    pub(crate) fn event(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.jobs.handle(self.now, event, &mut effects);
        self.jobs.check().unwrap();
        self.note_commits();
        effects.into_iter().for_each(|effect| self.perform(effect));
    }

    /// No step is committed without every vote, none twice, and none is taken back, but for those after the last durable one where
    /// not every step is durable.
    fn note_commits(&mut self) {
        let sessions: Vec<(SessionId, JobId)> =
            self.members.iter().map(|(session, (job, _))| (*session, *job)).collect();
        for id in sessions.iter().map(|(_, job)| *job).collect::<BTreeSet<_>>() {
            let Some(record) = self.jobs.job(id) else { continue };
            let before = self.committed.entry(id).or_default();
            if let Some(full) = record.settings.as_ref().and_then(|settings| settings.full)
                && record.steps < *before
            {
                let durable = (*before - 1) / full.durable_every * full.durable_every;
                assert!(record.steps >= durable, "job {id} fell from step {before} to {}", record.steps);
                *before = record.steps;
            }
            assert!(record.steps + 1 >= *before, "job {id} fell from step {before} to {}", record.steps);
            if record.steps <= *before {
                continue;
            }
            assert_eq!(record.steps, *before + 1, "a step was committed out of turn");
            let all = sessions
                .iter()
                .filter(|(_, job)| *job == id)
                .any(|(session, _)| self.votes.get(&(*session, *before)) == Some(&self.members[session].1));
            assert!(all, "step {before} of job {id} was committed without every vote");
            *before = record.steps;
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Reply { call, reply, .. } => {
                assert!(self.replies.insert(call, *reply).is_none(), "call {call} is answered twice");
            }
            Effect::Prepare { gateway, job } => self.preparing.push_back((gateway, job.request.id)),
            Effect::ToNodes(connections, message) => {
                connections.into_iter().for_each(|rank| self.tell(rank, &message));
            }
            wish @ Effect::DeleteBlobs { .. } => self.deletions.push_back(wish),
            Effect::Publish(load) => self.publishing.push_back(load),
            Effect::Withdraw(name) => self.withdrawn.push(name),
            Effect::StoreCandidate { .. } | Effect::Compare { .. } | Effect::Promote { .. } => {
                self.served.ask(effect);
            }
            Effect::Sweep(references) => {
                let shares = self.stored.jobs.values().filter(|job| !job.record.status.is_final());
                let shares = shares.flat_map(|job| job.record.shards.iter());
                shares.for_each(|share| assert!(references.blobs.contains(share)));
            }
            Effect::Warn(_) | Effect::Note(_) => {}
            wish => self.stored.wishes.push_back(wish),
        }
    }

    /// Deletes blobs of one wish; whether there was one.
    pub(crate) fn delete_one(&mut self) -> bool {
        let Some(Effect::DeleteBlobs { job, blobs }) = self.deletions.pop_front() else { return false };
        for blob in &blobs {
            self.stored.blobs.remove(blob);
            self.deleted.push(*blob);
        }
        self.check_blobs();
        self.event(Event::BlobsDeleted { job, blobs });
        true
    }

    /// What a durable record refers to is there.
    fn check_blobs(&self) {
        for job in self.stored.jobs.values().filter(|job| !job.record.status.is_final()) {
            for shard in &job.record.shards {
                assert!(
                    self.stored.blobs.contains(shard),
                    "{shard} of job {} is gone",
                    job.record.request.id
                );
            }
        }
    }

    /// Lets the store do one thing; whether there was one.
    pub(crate) fn store_works(&mut self) -> bool {
        if self.stored.down {
            return false;
        }
        let Some(wish) = self.stored.wishes.pop_front() else { return false };
        let event = match wish {
            Effect::SaveFile(file) => {
                let id = file.id;
                self.stored.files.insert(id, file);
                Event::Saved(SaveId::File(id))
            }
            Effect::ForgetFile(id) => {
                self.stored.files.remove(&id);
                Event::Saved(SaveId::File(id))
            }
            Effect::SaveJob { job, chunks } => {
                let id = job.record.request.id;
                for (chunk, events) in chunks {
                    let numbers = events.iter().map(|event| event.number);
                    assert!(numbers.eq((chunk * 128..).take(events.len())), "a chunk has a gap");
                    self.stored.events.insert((id, chunk), events);
                }
                if let Some(former) = self.stored.jobs.get(&id) {
                    let is_full =
                        job.record.settings.as_ref().is_some_and(|settings| settings.full.is_some());
                    assert!(is_full || former.record.steps <= job.record.steps, "a record went back");
                    assert!(!former.record.status.is_final() || job.record.status.is_final());
                }
                self.stored.jobs.insert(id, *job);
                self.check_blobs();
                Event::Saved(SaveId::Job(id))
            }
            Effect::ReadEvents { read, job, from, to } => {
                let chunks = (from..to).filter_map(|chunk| self.stored.events.get(&(job, chunk)));
                Event::EventsRead { read, events: Some(chunks.flatten().cloned().collect()) }
            }
            Effect::WriteResults { job, .. } => {
                Event::ResultsWritten { job, outcome: Ok((BlobId([3; 32]), 10)) }
            }
            other => panic!("{other:?}"),
        };
        self.event(event);
        true
    }

    pub(crate) fn store_goes(&mut self) {
        if !self.stored.down {
            self.stored.down = true;
            self.event(Event::StoreDown("gone".into()));
        }
    }

    pub(crate) fn store_comes(&mut self) {
        if self.stored.down {
            self.stored.down = false;
            self.event(Event::StoreUp);
        }
    }

    fn load(&mut self) {
        for job in self.stored.jobs.values_mut() {
            job.term = LeaseTerm(self.term);
        }
        let tail = |id: JobId| -> Vec<JobEvent> {
            let chunks = self.stored.events.range((id, 0)..=(id, u64::MAX));
            let chunks: Vec<_> = chunks.map(|(_, events)| events).collect();
            chunks.iter().skip(chunks.len().saturating_sub(2)).flat_map(|events| (*events).clone()).collect()
        };
        let jobs = self.stored.jobs.iter().map(|(id, job)| (job.clone(), tail(*id))).collect();
        let files = self.stored.files.values().cloned().collect();
        self.event(Event::Loaded(Box::new(Loaded { files, jobs })));
    }

    /// The scheduler dies; another one takes over from what is stored. Ranks and gateways connect anew.
    pub(crate) fn scheduler_dies(&mut self) {
        self.term += 1;
        self.stored.wishes.clear();
        self.stored.down = false;
        self.jobs = Jobs::new(config(self.term, self.max_jobs_running));
        self.preparing.clear();
        self.publishing.clear();
        self.deletions.clear();
        self.served.scheduler_dies();
        self.replies.clear();
        self.event(Event::WallClock(5_000 + self.now.0 / 1000));
        self.load();
        for id in self.stored.jobs.keys() {
            let (now, before) = (self.jobs.job(*id).unwrap().steps, self.committed.get(id).copied());
            assert!(now + 1 >= before.unwrap_or(0), "more than one step is lost");
            if let Some(committed) = self.committed.get_mut(id) {
                *committed = now;
            }
        }
        let gateways: Vec<u64> = self.gateways.iter().map(|gateway| gateway.0).collect();
        self.gateways.clear();
        gateways.into_iter().for_each(|gateway| self.gateway_up(gateway + 100));
        let replicas: Vec<u32> = self.up.keys().map(|replica| replica.0).collect();
        self.ranks.clear();
        self.up.clear();
        replicas.into_iter().for_each(|replica| self.replica_up(replica));
    }

    pub(crate) fn gateway_up(&mut self, gateway: u64) {
        self.gateways.insert(GatewayId(gateway));
        self.event(Event::GatewayUp(GatewayId(gateway)));
    }

    pub(crate) fn gateway_dies(&mut self, gateway: GatewayId) {
        self.gateways.remove(&gateway);
        self.preparing.retain(|(with, _)| *with != gateway);
        self.served.gateway_dies(gateway);
        self.event(Event::GatewayGone(gateway));
    }

    /// A replica comes up, on nodes that have connected anew.
    pub(crate) fn replica_up(&mut self, replica: u32) {
        let mut ranks = Vec::new();
        for stage in 0..STAGES {
            self.connections += 1;
            let connection = NodeConnection(self.connections);
            self.ranks.insert(connection, Rank::default());
            let start = stage as usize * 4;
            ranks.push(TrainingRank {
                connection,
                address: format!("{replica}-{stage}"),
                stage: StageIndex(stage),
                rank: TensorRank(0),
                layers: LayerRange { start, end: start + 4 },
                room: RankRoom {
                    node: NodeId(format!("{replica}-{stage}")),
                    capacity: SERVING + self.memory,
                    serving: SERVING,
                    threads: 1,
                    piece: piece(stage),
                },
            });
        }
        let revision = ReplicaRevision(self.connections);
        let up = TrainingReplica { replica: ReplicaId(replica), revision, ranks };
        self.up.insert(up.replica, up.clone());
        self.event(Event::ReplicaUp(up));
    }

    /// A rank of a replica dies, and with it what it has said but nobody has heard.
    pub(crate) fn replica_dies(&mut self, replica: u32) {
        let Some(down) = self.up.remove(&ReplicaId(replica)) else { return };
        for rank in &down.ranks {
            self.ranks.remove(&rank.connection);
        }
        self.event(Event::ReplicaDown { replica: down.replica, reason: "node a was lost: killed".into() });
    }

    fn tell(&mut self, connection: NodeConnection, message: &ToNode) {
        let Some(rank) = self.ranks.get_mut(&connection) else { return };
        match message {
            ToNode::OpenSession(open) => {
                let steps = match &open.start {
                    SessionStart::New => 0,
                    SessionStart::Resume { steps, shards } => {
                        let all: BTreeSet<BlobId> =
                            (0..STAGES).map(|stage| share(open.job, *steps, stage)).collect();
                        assert_eq!(shards.iter().copied().collect::<BTreeSet<_>>(), all);
                        assert!(all.is_subset(&self.stored.blobs), "a share to resume from is gone");
                        *steps
                    }
                };
                assert!([1, 2, 4, 8].contains(&open.replicas) && open.peers.len() == open.replicas as usize);
                let stage = if open.next.is_some() { 0 } else { STAGES - 1 };
                let names_shares = open.replica == 0;
                let root = names_shares && stage == 0;
                rank.parts.insert(
                    open.session,
                    Part { job: open.job, stage, names_shares, root, steps, prepared: false },
                );
                self.opened.push((open.job, open.settings.clone()));
                rank.said.push_back((open.session, TrainingReport::Opened { reserved: Bytes(1) }));
                let members = self.members.entry(open.session);
                members.or_insert((open.job, BTreeSet::new())).1.insert(connection);
            }
            ToNode::Training { session, work } => {
                let Some(part) = rank.parts.get_mut(session) else { return };
                // Work says that everything before is committed.
                part.steps += u64::from(std::mem::take(&mut part.prepared));
                let report = match work {
                    TrainingWork::Step { step } => {
                        assert_eq!(*step, part.steps, "a step is asked for out of turn");
                        part.prepared = true;
                        let shard = share(part.job, step + 1, part.stage);
                        let names_one = part.names_shares && self.settings.is_durable(step + 1);
                        if names_one {
                            self.stored.blobs.insert(shard);
                        }
                        let metrics = StepMetrics {
                            loss: if self.skipped { f64::NAN } else { 2.0 },
                            accuracy: 0.5,
                            learning_rate: 1e-4,
                            gradient_norm: 1.0,
                            targets: 10,
                            tokens: 20,
                            skipped: self.skipped,
                            rewards: None,
                        };
                        TrainingReport::Prepared {
                            step: *step,
                            shard: names_one.then_some(shard),
                            metrics: part.root.then_some(metrics),
                            timing: TrainingTiming::default(),
                        }
                    }
                    TrainingWork::Evaluate if part.root => {
                        let loss = self.losses.get(&part.steps).copied().unwrap_or(1.0);
                        TrainingReport::Evaluated { loss, accuracy: 0.25 }
                    }
                    TrainingWork::Export { shards } if part.root => {
                        assert_eq!(shards.len(), STAGES as usize);
                        let all = (0..STAGES).map(|stage| share(part.job, part.steps, stage));
                        assert!(
                            all.into_iter().all(|share| shards.contains(&share)),
                            "shares of another step"
                        );
                        let adapter = AdapterId(share(part.job, part.steps, 99));
                        let file = |(number, name): (u32, &str)| ExportedFile {
                            name: name.to_owned(),
                            blob: share(part.job, part.steps, 90 + number),
                            bytes: 10,
                        };
                        let usable = self.usable.clone();
                        if self.settings.full.is_some() {
                            let files = (0..).zip(MODEL_FILES).map(file).collect();
                            TrainingReport::ModelExported { manifest: adapter.0, files, usable }
                        } else {
                            let files = (0..).zip(ADAPTER_FILES).map(file).collect();
                            TrainingReport::Exported { adapter, files, usable }
                        }
                    }
                    TrainingWork::Evaluate | TrainingWork::Export { .. } => return,
                    TrainingWork::Close => {
                        rank.parts.remove(session);
                        return;
                    }
                };
                rank.said.push_back((*session, report));
            }
            other => panic!("{other:?}"),
        }
    }

    /// Ranks of whom something is to be heard.
    pub(crate) fn talkative(&self) -> Vec<NodeConnection> {
        self.ranks.iter().filter(|(_, rank)| !rank.said.is_empty()).map(|(rank, _)| *rank).collect()
    }

    /// Hears one thing that a rank has said.
    pub(crate) fn hear(&mut self, connection: NodeConnection) {
        let Some((session, report)) = self.ranks.get_mut(&connection).and_then(|rank| rank.said.pop_front())
        else {
            return;
        };
        if let TrainingReport::Prepared { step, .. } = &report {
            self.votes.entry((session, *step)).or_default().insert(connection);
        }
        self.event(Event::Report { connection, session, report: Box::new(report) });
    }

    /// A rank of a job's session says this instead of what it would have said.
    pub(crate) fn say(&mut self, id: JobId, report: TrainingReport) {
        let of = |rank: &&mut Rank| rank.parts.values().any(|part| part.job == id);
        let rank = self.ranks.values_mut().find(of).unwrap();
        let session = *rank.parts.iter().find(|(_, part)| part.job == id).unwrap().0;
        rank.said.clear();
        rank.said.push_back((session, report));
    }

    pub(crate) fn prepare_one(&mut self) -> bool {
        let Some((gateway, job)) = self.preparing.pop_front() else { return false };
        let data = DataReport {
            examples: 10,
            samples: 10,
            tokens: 100,
            target_tokens: 50,
            longest_sample_rows: self.longest_sample_rows,
            truncated_examples: 0,
            truncated_tokens: 0,
            warnings: Vec::new(),
        };
        // Seeds differ, so that shares of different jobs do.
        let settings = TrainingSettings { seed: (job.0 >> 96) as u64, ..self.settings.clone() };
        let promote = self.jobs.job(job).and_then(|record| record.request.promote);
        let evaluation = promote.map(|_| BlobId([5; 32]));
        let outcome = Box::new(Ok(PreparedJob { settings, data, evaluation }));
        self.event(Event::Prepared { gateway, job, outcome });
        true
    }

    pub(crate) fn publish_one(&mut self) -> bool {
        let Some(load) = self.publishing.pop_front() else { return false };
        self.published.push(load.name.clone());
        self.event(Event::Published { name: load.name });
        true
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        self.now = self.now.plus(ms);
        self.event(Event::Tick);
    }

    /// What is said next is said so much later.
    pub(crate) fn later(&mut self, ms: u64) {
        self.now = self.now.plus(ms);
    }

    /// Does everything that waits, ranks first; whether there was anything.
    pub(crate) fn step(&mut self) -> bool {
        match self.talkative().first() {
            Some(rank) => self.hear(*rank),
            None => {
                return self.delete_one()
                    || self.store_works()
                    || self.prepare_one()
                    || self.publish_one()
                    || self.promote_one();
            }
        }
        true
    }

    pub(crate) fn settle(&mut self) {
        let mut steps = 0;
        while self.step() {
            steps += 1;
            assert!(steps < 100_000, "it never ends");
        }
    }

    /// Settles until a job's record is as wanted.
    pub(crate) fn until(&mut self, id: JobId, wanted: impl Fn(&JobRecord) -> bool) {
        for _ in 0..10_000 {
            if wanted(self.jobs.job(id).unwrap()) {
                return;
            }
            if !self.step() {
                self.pass(1_000);
            }
        }
        panic!("{:?}", self.jobs.job(id));
    }

    pub(crate) fn call(&mut self, request: AdminRequest) -> u64 {
        self.calls += 1;
        let gateway = self.gateways.first().copied().unwrap_or(GatewayId(0));
        self.event(Event::Admin {
            gateway,
            call: self.calls,
            tenant: self.tenant.clone(),
            request: Box::new(request),
        });
        self.calls
    }

    /// Calls, and lets the store work until there is an answer.
    pub(crate) fn ask(&mut self, request: AdminRequest) -> AdminReply {
        let call = self.call(request);
        while !self.replies.contains_key(&call) {
            assert!(self.store_works(), "no answer");
        }
        self.replies.remove(&call).unwrap()
    }

    pub(crate) fn create(&mut self, id: u128) -> JobId {
        self.create_as(request(id))
    }

    pub(crate) fn create_as(&mut self, request: JobRequest) -> JobId {
        let job = request.id;
        let reply = self.ask(AdminRequest::CreateJob(Box::new(request)));
        assert!(matches!(reply, AdminReply::Job(_)), "{reply:?}");
        job
    }

    pub(crate) fn control(&mut self, id: JobId, action: JobAction) -> AdminReply {
        self.ask(AdminRequest::ControlJob(id, action))
    }

    pub(crate) fn record(&self, id: JobId) -> &JobRecord {
        self.jobs.job(id).unwrap()
    }

    pub(crate) fn status(&self, id: JobId) -> JobStatus {
        self.record(id).status
    }

    /// All events, oldest first, through the call that lists them.
    pub(crate) fn events(&mut self, id: JobId) -> Vec<JobEvent> {
        let (mut events, mut after) = (Vec::new(), None);
        loop {
            let page = Page { after, limit: 50 };
            let AdminReply::Events(listed, more) = self.ask(AdminRequest::ListEvents(id, page)) else {
                panic!("no events");
            };
            after = listed.last().map(|last| last.number);
            events.extend(listed);
            if !more {
                break;
            }
        }
        events.reverse();
        assert!(events.iter().map(|event| event.number).eq(0..events.len() as u64));
        events
    }

    /// What happened, in short.
    pub(crate) fn story(&mut self, id: JobId) -> Vec<String> {
        let short = |event: &JobEvent| match &event.what {
            JobEventKind::Created => "created".into(),
            JobEventKind::Validating => "validating".into(),
            JobEventKind::Queued(_) => "queued".into(),
            JobEventKind::Started => "started".into(),
            JobEventKind::Step { step, .. } => format!("step {step}"),
            JobEventKind::Evaluated { step, .. } => format!("evaluated {step}"),
            JobEventKind::Checkpoint { step, .. } => format!("checkpoint {step}"),
            JobEventKind::Interrupted(_) => "interrupted".into(),
            JobEventKind::Paused => "paused".into(),
            JobEventKind::Resumed => "resumed".into(),
            JobEventKind::StoppedEarly { step } => format!("stopped {step}"),
            JobEventKind::ModelCreated(_) => "model".into(),
            JobEventKind::ModelStored(files) => format!("stored {} files", files.len()),
            JobEventKind::Succeeded => "succeeded".into(),
            JobEventKind::Cancelled => "cancelled".into(),
            JobEventKind::Failed(error) => format!("failed {}", error.code),
            JobEventKind::Slowed(_) => "slowed".into(),
            JobEventKind::WaitsForMemory(_) => "waits".into(),
            JobEventKind::Comparing { generation, .. } => format!("comparing {generation}"),
            JobEventKind::Compared(outcome) => format!("compared {}", outcome.is_promoted()),
        };
        self.events(id).iter().map(short).collect()
    }
}
