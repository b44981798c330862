//! Jobs: the embedded store, blobs in a directory. The ranks compute nothing.

use crate::harness::{self, AbortOnDrop, Gateway, Running, join, knock, live, ready};
use crate::model::{DIGEST, card};
use ashlar_protocol::admin::{
    AdminFailureKind, AdminReply, AdminRequest, DataReport, FileRecord, JobAction, JobEvent, JobRecord,
    JobRequest, JobStatus, LoadAdapter, Page, PreparedJob,
};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{FromScheduler, ToScheduler};
use ashlar_protocol::training::{
    LoraSettings, StepMetrics, TrainingMethod, TrainingReport, TrainingSettings, TrainingTiming,
    TrainingWork, ValidationData,
};
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_store::blobs::{self, BlobOptions};
use ashlar_vocabulary::{AdapterId, BlobId, Bytes, Decay, FileId, JobId, Schedule};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

/// A number whose nearest shorter decimal is another one: it must come back from the store to the bit.
const RATE: f64 = 1.000_000_000_000_000_4e-4;

async fn start(state: &Path, with_blobs: bool) -> Running {
    let config = SchedulerConfig {
        blobs: with_blobs.then(|| state.join("blobs").display().to_string()),
        stages: Some(1),
        ..harness::config(state)
    };
    Running::start(Scheduler::bind(config, card()).await.unwrap())
}

/// A node that is ready at once, and takes 5 ms for a step.
fn node(address: SocketAddr) -> AbortOnDrop {
    AbortOnDrop(tokio::spawn(async move {
        let Ok(socket) = knock("a", address).await else { return };
        let _ = live(socket, join("a", 0), answer).await;
    }))
}

fn answer(message: ToNode) -> Option<(Duration, FromNode)> {
    match message {
        ToNode::Assign(assignment) => Some((Duration::ZERO, ready(&assignment))),
        ToNode::OpenSession(open) => {
            let report = Box::new(TrainingReport::Opened { reserved: Bytes(1) });
            Some((Duration::ZERO, FromNode::Training { session: open.session, report }))
        }
        ToNode::Training { session, work: TrainingWork::Step { step } } => {
            let report = Box::new(stepped(step));
            Some((Duration::from_millis(5), FromNode::Training { session, report }))
        }
        _ => None,
    }
}

fn stepped(step: u64) -> TrainingReport {
    let metrics = StepMetrics {
        loss: 2.0,
        accuracy: 0.5,
        learning_rate: RATE,
        gradient_norm: 1.0,
        targets: 10,
        tokens: 20,
        skipped: false,
        rewards: None,
    };
    TrainingReport::Prepared {
        step,
        shard: Some(BlobId([step as u8; 32])),
        metrics: Some(metrics),
        timing: TrainingTiming::default(),
    }
}

/// A gateway that validates jobs, and asks until the scheduler has read its store.
struct Administrator(Gateway);

impl Administrator {
    async fn connect(address: SocketAddr) -> Administrator {
        Administrator(Gateway::connect(address).await)
    }

    async fn ask(&mut self, request: AdminRequest) -> AdminReply {
        let hear = |said| match said {
            FromScheduler::Prepare(job) => {
                Some(ToScheduler::Prepared { job: job.request.id, outcome: Box::new(Ok(prepared())) })
            }
            _ => None,
        };
        loop {
            match self.0.call_hearing(request.clone(), hear).await {
                AdminReply::Refused(failure) if failure.message.contains("not known yet") => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                reply => return reply,
            }
        }
    }

    async fn job(&mut self, id: JobId) -> JobRecord {
        match self.ask(AdminRequest::GetJob(id)).await {
            AdminReply::Job(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    async fn until(&mut self, id: JobId, wanted: impl Fn(&JobRecord) -> bool) -> JobRecord {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let record = self.job(id).await;
            if wanted(&record) {
                return record;
            }
            assert!(Instant::now() < deadline, "{record:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn events(&mut self, id: JobId, after: Option<u64>) -> Vec<JobEvent> {
        match self.ask(AdminRequest::ListEvents(id, Page { after, limit: 1000 })).await {
            AdminReply::Events(events, _) => events,
            other => panic!("{other:?}"),
        }
    }
}

fn prepared() -> PreparedJob {
    let settings = TrainingSettings {
        dataset: BlobId([9; 32]),
        validation: ValidationData::None,
        method: TrainingMethod::Dpo { beta: 0.1 },
        lora: LoraSettings {
            rank: 8,
            alpha: 16.0,
            rank_stabilized: false,
            dropout: 0.05,
            targets: vec!["q_proj".into()],
        },
        full: None,
        epochs: 1,
        batch_size: 8,
        seed: u64::MAX,
        micro_batch_rows: 64,
        packing: true,
        keep_activations: true,
        learning_rate: RATE,
        schedule: Schedule { warmup_steps: 1, decay: Decay::Cosine { floor: 0.1 } },
        adam: (0.9, 0.999, 1e-8),
        weight_decay: 0.01,
        norm_max: Some(1.0),
        steps: 100_000,
        steps_per_epoch: 100_000,
        evaluate_every: 100,
        patience: None,
    };
    let data = DataReport {
        examples: 10,
        samples: 10,
        tokens: 100,
        target_tokens: 50,
        longest_sample_rows: 8,
        truncated_examples: 0,
        truncated_tokens: 0,
        warnings: vec!["a \"warning\"".into()],
    };
    PreparedJob { settings, data, evaluation: None }
}

fn file() -> FileRecord {
    FileRecord {
        id: FileId(u128::MAX - 5),
        name: "ä b.jsonl".into(),
        purpose: "fine-tune".into(),
        bytes: 100,
        created_at: 1_700_000_000,
        blob: BlobId([4; 32]),
        owner: None,
    }
}

fn request() -> JobRequest {
    JobRequest {
        id: JobId(u128::MAX - 7),
        created_at: 1_700_000_001,
        model: "demo".into(),
        model_digest: DIGEST,
        training_file: file().id,
        validation_file: None,
        suffix: None,
        metadata: BTreeMap::from([("k".into(), "v".into())]),
        settings: "{}".into(),
        promote: None,
        owner: None,
        training_minutes_max: None,
    }
}

#[tokio::test]
async fn a_job_goes_on_under_a_new_term_from_what_the_store_holds() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), true).await;
    let mut gateway = Administrator::connect(running.gateways).await;
    assert_eq!(gateway.ask(AdminRequest::PutFile(file())).await, AdminReply::File(file()));
    let id = request().id;
    let reply = gateway.ask(AdminRequest::CreateJob(Box::new(request()))).await;
    assert!(matches!(&reply, AdminReply::Job(job) if job.request == request()), "{reply:?}");
    gateway.until(id, |record| record.status == JobStatus::Queued).await;
    let rank = node(running.nodes);
    // More events than one chunk has.
    gateway.until(id, |record| record.steps >= 150).await;
    drop(rank);
    running.stop().await;

    let running = start(state.path(), true).await;
    let mut gateway = Administrator::connect(running.gateways).await;
    assert_eq!(gateway.ask(AdminRequest::GetFile(file().id)).await, AdminReply::File(file()));
    let record = gateway.job(id).await;
    assert_eq!((record.status, record.settings), (JobStatus::Running, Some(prepared().settings)));
    assert!(record.steps >= 149, "one step at most is lost: {}", record.steps);
    assert_eq!(record.data, Some(prepared().data));
    assert_eq!(record.last.unwrap().learning_rate.to_bits(), RATE.to_bits());
    let events = gateway.events(id, None).await;
    assert!(events.iter().rev().map(|event| event.number).eq(0..record.events));
    assert!(events.iter().all(|event| event.created_at > 1_600_000_000));
    let _rank = node(running.nodes);
    let before = record.steps;
    gateway.until(id, |record| record.steps > before + 10).await;

    let AdminReply::Job(record) = gateway.ask(AdminRequest::ControlJob(id, JobAction::Cancel)).await else {
        panic!("it cannot be cancelled");
    };
    assert_eq!(record.status, JobStatus::Cancelled);
    let results = record.result_files[0];
    let file = loop {
        match gateway.ask(AdminRequest::GetFile(results)).await {
            AdminReply::File(file) => break file,
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!((file.purpose.as_str(), file.name.as_str()), ("fine-tune-results", "results.csv"));
    let address = state.path().join("blobs").display().to_string();
    let blobs = blobs::open(&address, &BlobOptions::default()).await.unwrap();
    let table = blobs.read(file.blob, 1 << 20).await.unwrap();
    let table = String::from_utf8(table).unwrap();
    assert_eq!(table.lines().count() as u64, record.steps + 1);
    assert!(table.lines().nth(1).unwrap().starts_with("1,2.00000,0.50000,"), "{table}");
    assert_eq!(gateway.events(id, Some(1)).await.len(), 1, "from the store");
    running.stop().await;
}

#[tokio::test]
async fn without_a_place_for_blobs_files_are_refused_with_the_key_to_set() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), false).await;
    let mut gateway = Administrator::connect(running.gateways).await;
    let AdminReply::Refused(failure) = gateway.ask(AdminRequest::PutFile(file())).await else {
        panic!("it was taken");
    };
    assert_eq!(failure.kind, AdminFailureKind::Unavailable);
    assert!(failure.message.contains("`blobs`"), "{}", failure.message);
    // A call about an adapter is answered, too.
    let load = LoadAdapter {
        name: "a".into(),
        adapter: AdapterId(BlobId([1; 32])),
        root: String::new(),
        created_at: 0,
        replace: false,
        expected_generation: None,
        hold_back: false,
        owner: None,
    };
    let _ = gateway.ask(AdminRequest::LoadAdapter(load)).await;
    running.stop().await;
}
