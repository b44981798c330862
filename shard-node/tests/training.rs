//! Sessions of fine-tuning jobs: ranks in one process, over real connections and a real blob store.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_dataset::plan::{JobPlan, PlanSettings};
use ashlar_dataset::{DatasetReader, DatasetWriter, Method, Sample, TokenSequence};
use ashlar_identity::Transport;
use ashlar_kernels::{Isa, Kernels, RowContext, YieldFlag};
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::peft::{PeftAdapter, WEIGHTS_FILE};
use ashlar_model::stage::{BatchLoss, MicroBatch, StageTrainer, TargetRow};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{RankSlice, SingleRank, StageInput, StageModel, Trained};
use ashlar_protocol::data::{LinkFaults, LinkPurpose};
use ashlar_protocol::membership::FromNode;
use ashlar_protocol::training::{
    FullSettings, LoraSettings, ModelStart, OpenSession, Rewards, SessionStart, StepMetrics, TrainingMethod,
    TrainingReport, TrainingSettings, TrainingWork, ValidationData,
};
use ashlar_shard_node::links::{self, LinkSettings};
use ashlar_shard_node::training::{Place, Resources, Sessions};
use ashlar_store::blobs::{self, BlobOptions, Blobs};
use ashlar_training::{Hyperparameters, NormTerms, RunTree, TrainingState, gradient_norm, initial_adapter};
use ashlar_vocabulary::{
    AdapterId, BlobId, BlockId, Decay, FloatType, HeadSlice, JobId, LayerRange, LeaseTerm, PARTS, Precision,
    Quantization, ReplicaRevision, Schedule, SessionId,
};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

const LAYERS: usize = 4;
const STEPS: u64 = 6;
const WAIT: Duration = Duration::from_secs(60);

/// What all tests share: a model, a blob store with samples, a runtime for it.
struct World {
    runtime: Runtime,
    directory: tempfile::TempDir,
    blobs: Blobs,
    /// The samples, in the store and here.
    dataset: BlobId,
    bytes: Vec<u8>,
    /// Pairs of answers, in the store.
    pairs: BlobId,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let runtime = Runtime::new().unwrap();
    let directory = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    // The same tied, with head norms: its first and its last stage share a table, its ranks a norm.
    let mut tied = config.clone();
    tied["architectures"][0] = "Qwen3ForCausalLM".into();
    tied["model_type"] = "qwen3".into();
    tied["tie_word_embeddings"] = true.into();
    for (name, config, dtype) in [("model", config, FloatType::F32), ("tied", tied, FloatType::Bf16)] {
        let shape = directory.path().join("shape.json");
        std::fs::write(&shape, config.to_string()).unwrap();
        let shape = shape.to_str().unwrap().to_owned();
        let request = SynthRequest { shape, dtype, seed: 3, tokenizer: None };
        synthesize(&directory.path().join(name), &request, &mut |_, _| {}).unwrap();
    }
    let mut writer = DatasetWriter::new(Vec::new(), Method::Supervised).unwrap();
    for index in 0..13_u32 {
        let length = 3 + (index * 7) % 23;
        let tokens = (0..length).map(|i| (i * 31 + index * 17 + 5) % 320).collect();
        // The last token always; of longer ones something in the middle, too.
        let mut targets = vec![length - 1..length];
        if length > 9 {
            targets.insert(0, 3..7);
        }
        let sequence = TokenSequence::new(tokens, targets).unwrap();
        writer.push(&Sample { example: index, sequences: vec![sequence] }).unwrap();
    }
    let (bytes, _) = writer.finish().unwrap();
    let pairs = pairs((0..13).map(|index| vec![answer(index, 0), answer(index, 1)]));
    let address = directory.path().join("blobs");
    let blobs = runtime.block_on(blobs::open(address.to_str().unwrap(), &BlobOptions::default())).unwrap();
    let dataset = runtime.block_on(blobs.put(&bytes)).unwrap().id;
    let pairs = runtime.block_on(blobs.put(&pairs)).unwrap().id;
    World { runtime, directory, blobs, dataset, bytes, pairs }
});

/// An answer of its own length to a prompt that both answers share.
fn answer(index: u32, which: u32) -> TokenSequence {
    let (prompt, length) = (1 + index % 4, 1 + (index * 5 + which * 3) % 11);
    let token = |i| if i < prompt { i * 13 + index } else { i * 31 + index * 17 + which * 29 + 5 };
    let tokens = (0..prompt + length).map(|i| token(i) % 320).collect();
    TokenSequence::new(tokens, vec![prompt..prompt + length]).unwrap()
}

/// Samples of preferences as a dataset's bytes.
fn pairs(samples: impl Iterator<Item = Vec<TokenSequence>>) -> Vec<u8> {
    let mut writer = DatasetWriter::new(Vec::new(), Method::Dpo).unwrap();
    for (example, sequences) in (0..).zip(samples) {
        writer.push(&Sample { example, sequences }).unwrap();
    }
    writer.finish().unwrap().0
}

impl World {
    fn model(&self) -> PathBuf {
        self.directory.path().join("model")
    }

    /// A model's directory.
    fn directory(&self, tied: bool) -> PathBuf {
        self.directory.path().join(if tied { "tied" } else { "model" })
    }

    /// The tensors' file of an adapter.
    fn tensors(&self, adapter: AdapterId) -> Vec<u8> {
        let entry = self.runtime.block_on(self.blobs.get_manifest(adapter.0)).unwrap().get(WEIGHTS_FILE);
        self.bytes(entry.unwrap().blob)
    }

    fn bytes(&self, blob: BlobId) -> Vec<u8> {
        self.runtime.block_on(self.blobs.read(blob, 64 << 20)).unwrap()
    }
}

fn settings() -> TrainingSettings {
    TrainingSettings {
        dataset: WORLD.dataset,
        validation: ValidationData::None,
        method: TrainingMethod::Supervised,
        lora: LoraSettings {
            rank: 3,
            alpha: 6.0,
            rank_stabilized: false,
            dropout: 0.0,
            targets: Target::ALL.map(|target| target.module().to_owned()).to_vec(),
        },
        full: None,
        epochs: 2,
        batch_size: 5,
        seed: 11,
        micro_batch_rows: 64,
        packing: true,
        keep_activations: true,
        learning_rate: 1e-2,
        schedule: Schedule { warmup_steps: 2, decay: Decay::Cosine { floor: 0.1 } },
        adam: (0.9, 0.999, 1e-8),
        weight_decay: 0.01,
        norm_max: Some(0.4),
        steps: STEPS,
        steps_per_epoch: STEPS / 2,
        evaluate_every: 3,
        patience: None,
    }
}

/// The same for pairs of answers.
fn preferences() -> TrainingSettings {
    TrainingSettings { dataset: WORLD.pairs, method: TrainingMethod::Dpo { beta: 0.4 }, ..settings() }
}

#[derive(Debug, Clone, Copy)]
struct Grid {
    stages: usize,
    ranks: usize,
    replicas: usize,
    shared_memory: bool,
    spread_head: bool,
    activations: FloatType,
    /// Which of the two models.
    tied: bool,
    /// The rank, in order, whose links break, and before which of their sends.
    fault: Option<(usize, u64)>,
}

const ONE: Grid = Grid {
    stages: 1,
    ranks: 1,
    replicas: 1,
    shared_memory: false,
    spread_head: false,
    activations: FloatType::F32,
    tied: false,
    fault: None,
};

fn grid(stages: usize, ranks: usize, replicas: usize) -> Grid {
    Grid { stages, ranks, replicas, ..ONE }
}

struct Node {
    sessions: Sessions,
    reports: mpsc::Receiver<FromNode>,
    address: String,
    model: Arc<StageModel>,
    urgent: YieldFlag,
    /// Replica, stage, rank.
    place: [usize; 3],
}

impl Node {
    fn start(grid: Grid, place: [usize; 3], faults: LinkFaults) -> Node {
        let [replica, stage, rank] = place;
        let slice = RankSlice {
            layers: LayerRange {
                start: stage * LAYERS / grid.stages,
                end: (stage + 1) * LAYERS / grid.stages,
            },
            first: stage == 0,
            last: stage + 1 == grid.stages,
            tensor_rank: rank,
            tensor_parallel_size: grid.ranks,
            head: HeadSlice::of_rank(grid.spread_head, (stage, grid.stages), (rank, grid.ranks)),
        };
        let kernels = Arc::new(Kernels::new(Isa::best(), 1));
        let mut precision = Precision::from(None::<Quantization>);
        precision.activations = grid.activations;
        let directory = WORLD.directory(grid.tied);
        let model = StageModel::load(&directory, precision, slice, kernels, &mut |_, _| {}).unwrap();
        let model = Arc::new(model);
        let (out, reports) = mpsc::channel(64);
        let urgent = YieldFlag::default();
        let resources = Resources {
            blobs: Some(WORLD.blobs.clone()),
            runtime: WORLD.runtime.handle().clone(),
            directory: WORLD.directory.path().join("training"),
            isa: Isa::best(),
            threads: 1,
            links: LinkSettings { faults, shared_memory: grid.shared_memory, spin: Duration::ZERO },
            transport: Transport::Plain,
            urgent: urgent.clone(),
        };
        let sessions = Sessions::new(resources, out);
        sessions.enter(Place {
            term: LeaseTerm(1),
            revision: ReplicaRevision(7 + replica as u64),
            stage,
            num_stages: grid.stages,
            model: model.clone(),
            model_name: "base".into(),
            directory,
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let arrivals = sessions.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(inbound) = links::accept(socket.unwrap(), &Transport::Plain) else { continue };
                let LinkPurpose::Training { session, link } = inbound.hello.purpose else { continue };
                arrivals.arrived(session, link, inbound.socket);
            }
        });
        Node { sessions, reports, address, model, urgent, place }
    }

    fn report(&mut self, session: u64) -> TrainingReport {
        let next = async { tokio::time::timeout(WAIT, self.reports.recv()).await };
        let message = WORLD.runtime.block_on(next).expect("a report in time").expect("an open channel");
        let FromNode::Training { session: of, report } = message else { panic!("{message:?}") };
        assert_eq!(of, SessionId(session));
        *report
    }
}

/// Ranks of a job, and the scheduler's part.
struct Job {
    nodes: Vec<Node>,
    session: u64,
}

impl Job {
    fn start(grid: Grid) -> Job {
        let mut nodes = Vec::new();
        for replica in 0..grid.replicas {
            for stage in 0..grid.stages {
                for rank in 0..grid.ranks {
                    let breaks = grid.fault.filter(|(at, _)| *at == nodes.len());
                    let break_after = breaks.map_or(0, |(_, sends)| sends);
                    let faults = LinkFaults { delay_us: 0, break_after };
                    nodes.push(Node::start(grid, [replica, stage, rank], faults));
                }
            }
        }
        Job { nodes, session: 0 }
    }

    fn address(&self, place: [usize; 3]) -> Option<String> {
        self.nodes.iter().find(|node| node.place == place).map(|node| node.address.clone())
    }

    fn along(&self, place: impl Fn(usize) -> [usize; 3]) -> Vec<String> {
        (0..).map_while(|index| self.address(place(index))).collect()
    }

    /// Asks every rank to open a session; each one's first report.
    fn ask(&mut self, settings: &TrainingSettings, start: &SessionStart) -> Vec<TrainingReport> {
        self.session += 1;
        for node in &self.nodes {
            let [replica, stage, rank] = node.place;
            let peers = self.along(|replica| [replica, stage, rank]);
            node.sessions.open(OpenSession {
                session: SessionId(self.session),
                job: JobId(5),
                revision: ReplicaRevision(7 + replica as u64),
                settings: settings.clone(),
                start: start.clone(),
                replica: replica as u32,
                replicas: peers.len() as u32,
                group: self.along(|rank| [replica, stage, rank]),
                next: self.address([replica, stage + 1, rank]),
                peers,
            });
        }
        self.reports()
    }

    fn open(&mut self, settings: &TrainingSettings, start: &SessionStart) {
        for report in self.ask(settings, start) {
            let TrainingReport::Opened { reserved } = report else { panic!("{report:?}") };
            assert!(reserved.0 > 0);
        }
    }

    fn reports(&mut self) -> Vec<TrainingReport> {
        self.nodes.iter_mut().map(|node| node.report(self.session)).collect()
    }

    fn give(&self, work: &TrainingWork) {
        self.nodes.iter().for_each(|node| node.sessions.work(SessionId(self.session), work.clone()));
    }

    /// Metrics and the shards of the state after the step.
    fn step(&mut self, step: u64) -> (StepMetrics, Vec<BlobId>) {
        self.give(&TrainingWork::Step { step });
        let (mut metrics, mut shards) = (None, Vec::new());
        for (report, node) in self.reports().into_iter().zip(&self.nodes) {
            let TrainingReport::Prepared { step: of, shard, metrics: own, .. } = report else {
                panic!("{report:?}");
            };
            assert_eq!((of, shard.is_some()), (step, node.place[0] == 0));
            assert_eq!(own.is_some(), node.place == [0, 0, 0], "the root alone tells metrics");
            metrics = metrics.or(own);
            shards.extend(shard);
        }
        (metrics.unwrap(), shards)
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) -> (Vec<StepMetrics>, Vec<BlobId>) {
        let done: Vec<_> = steps.map(|step| self.step(step)).collect();
        let shards = done.last().map(|(_, shards)| shards.clone()).unwrap();
        (done.into_iter().map(|(metrics, _)| metrics).collect(), shards)
    }

    fn evaluate(&mut self) -> (f64, f64) {
        self.give(&TrainingWork::Evaluate);
        let report = self.nodes[0].report(self.session);
        let TrainingReport::Evaluated { loss, accuracy } = report else { panic!("{report:?}") };
        (loss, accuracy)
    }

    fn export(&mut self, shards: Vec<BlobId>) -> (Vec<u8>, Result<(), String>) {
        self.give(&TrainingWork::Export { shards });
        let report = self.nodes[0].report(self.session);
        match report {
            TrainingReport::Exported { adapter, usable, files: _ } => (WORLD.tensors(adapter), usable),
            TrainingReport::ModelExported { files, usable, .. } => {
                let weights = files.iter().find(|file| file.name == "model.safetensors").unwrap();
                (WORLD.bytes(weights.blob), usable)
            }
            other => panic!("{other:?}"),
        }
    }

    fn close(&mut self) {
        self.close_and_hear(|said| said.is_none());
    }

    /// The same right after a measurement, which the root alone reports: who is still at it when another one has closed its links may
    /// say that it cannot go on.
    fn close_measured(&mut self) {
        self.close_and_hear(|said| match said {
            None => true,
            Some(FromNode::Training { report, .. }) => {
                matches!(**report, TrainingReport::Failed { retry: true, .. })
            }
            Some(_) => false,
        });
    }

    fn close_and_hear(&mut self, may: fn(Option<&FromNode>) -> bool) {
        self.give(&TrainingWork::Close);
        for node in &mut self.nodes {
            node.sessions.leave("the test is over", &mut || ());
            let said = node.reports.try_recv().ok();
            assert!(may(said.as_ref()), "a closed session says nothing: {said:?}");
            assert!(node.reports.try_recv().is_err(), "a closed session says nothing more");
            assert_eq!(Arc::strong_count(&node.model), 1, "the weights are given up");
        }
    }

    fn train(settings: &TrainingSettings, grid: Grid) -> (Vec<u8>, Vec<StepMetrics>) {
        let mut job = Job::start(grid);
        job.open(settings, &SessionStart::New);
        let (metrics, shards) = job.steps(0..STEPS);
        let (tensors, usable) = job.export(shards);
        assert_eq!(usable, Ok(()));
        job.close();
        (tensors, metrics)
    }
}

fn spec() -> LoraSpec {
    LoraSpec { rank: 3, alpha: 6.0, rank_stabilized: false, targets: Target::ALL.to_vec() }
}

/// The whole job on one rank without sessions, sample by sample.
fn reference(settings: &TrainingSettings) -> Vec<u8> {
    let kernels = Arc::new(Kernels::new(Isa::best(), 2));
    let mut dataset = DatasetReader::open(Cursor::new(&WORLD.bytes[..])).unwrap();
    let sizes = dataset.sizes().to_vec();
    let of_plan =
        PlanSettings { epochs: settings.epochs, batch_size: settings.batch_size, seed: settings.seed };
    let plan = JobPlan::new(sizes.clone(), (0..sizes.len() as u32).collect(), of_plan).unwrap();
    let config = ashlar_model::ModelConfig::from_dir(&WORLD.model()).unwrap();
    let (shape, slice) = (&config.shape, RankSlice::whole(&config.shape));
    let model = StageModel::load(
        &WORLD.model(),
        None::<Quantization>,
        slice.clone(),
        kernels.clone(),
        &mut |_, _| {},
    );
    let mut trainer = StageTrainer::new(Arc::new(model.unwrap()), kernels.clone(), 64);
    let start = initial_adapter(&spec(), shape, &slice, settings.seed).tensors;
    let trained = Trained::Adapter(spec());
    let mut state = TrainingState::new(&trained, start, shape, &slice, &kernels);
    let mut tree = RunTree::new(trained.sums(shape, &slice));
    let schedule = settings.schedule;
    let (beta1, beta2, epsilon) = settings.adam;
    let (weight_decay, norm_max) = (settings.weight_decay, settings.norm_max);
    let with = Hyperparameters { beta1, beta2, epsilon, weight_decay, norm_max };
    for step in 0..plan.steps() {
        let batch = plan.batch(step).unwrap();
        let mut loss = BatchLoss::default();
        for run in 0..PARTS {
            for position in batch.run(run) {
                let sequence = dataset.read(batch.samples()[position]).unwrap().sequences.remove(0);
                let rows = sequence.rows() as usize;
                let micro = MicroBatch::new(&[rows]);
                let targets: Vec<TargetRow> = sequence
                    .labels()
                    .map(|(row, token)| TargetRow { row: row as usize, token, weight: 1.0 })
                    .collect();
                let (adapter, group) = (state.packed().map(|adapter| &**adapter), &mut SingleRank);
                let input = StageInput::Tokens(&sequence.tokens()[..rows]);
                let beat = &mut || Ok(());
                let tape = trainer.forward(&micro, input, adapter, true, group, beat).unwrap();
                let factor = 1.0 / batch.targets() as f32;
                let (own, gradient) = trainer.loss(&targets, factor, rows, None, group).unwrap();
                let mut gradient = gradient.to_vec();
                loss = loss.and(own);
                let sink = tree.current();
                trainer.backward(&micro, tape, adapter, &mut gradient, sink, group, beat).unwrap();
            }
            tree.end_run(&kernels);
        }
        let gradient = tree.take();
        let norm = gradient_norm(&[vec![NormTerms::of(&gradient, &slice, &kernels)]]);
        let rate = (settings.learning_rate * schedule.factor(step, STEPS)) as f32;
        state.step(&gradient, norm, rate, &with, shape, &slice, &kernels);
        tree.recycle(gradient);
    }
    PeftAdapter::join(&spec(), shape, [state.weights()]).files("base").unwrap().1
}

#[test]
fn every_layout_and_micro_batch_exports_the_same_adapter() {
    let (expected, metrics) = Job::train(&settings(), ONE);
    assert!(expected == reference(&settings()), "a session trains what the crates train by themselves");
    assert!(metrics.last().unwrap().loss < metrics[0].loss, "{metrics:?}");
    for (grid, micro_batch_rows, keep_activations) in [
        (grid(2, 1, 1), 25, true),
        (grid(1, 2, 1), 64, false),
        (grid(1, 1, 2), 25, true),
        (grid(2, 2, 2), 25, false),
        (grid(4, 1, 1), 25, true),
        (grid(1, 1, 4), 25, true),
        (Grid { shared_memory: true, ..grid(2, 2, 1) }, 30, true),
        (Grid { spread_head: true, ..grid(2, 1, 1) }, 25, true),
        (Grid { spread_head: true, ..grid(2, 2, 1) }, 64, false),
    ] {
        let settings = TrainingSettings { micro_batch_rows, keep_activations, ..settings() };
        let (tensors, own) = Job::train(&settings, grid);
        assert_eq!(own, metrics, "{grid:?}");
        assert!(tensors == expected, "{grid:?}, {micro_batch_rows} rows, keep {keep_activations}");
    }
}

#[test]
fn samples_that_share_micro_batches_give_the_bits_of_samples_that_do_not() {
    for settings in [settings(), preferences(), full(ModelStart::Random)] {
        let (packed, metrics) = Job::train(&settings, ONE);
        for (grid, micro_batch_rows) in [(ONE, 64), (grid(2, 1, 1), 30), (grid(1, 2, 2), 64)] {
            let alone = TrainingSettings { packing: false, micro_batch_rows, ..settings.clone() };
            let (unpacked, own) = Job::train(&alone, grid);
            assert_eq!(own, metrics, "{grid:?}");
            assert!(unpacked == packed, "{grid:?}: an adapter of other bits");
        }
    }
}

/// All weights, from those of the files or from random ones; every step is durable.
fn full(start: ModelStart) -> TrainingSettings {
    TrainingSettings { full: Some(FullSettings { start, durable_every: 1 }), ..settings() }
}

fn tied(stages: usize, ranks: usize, replicas: usize) -> Grid {
    Grid { tied: true, ..grid(stages, ranks, replicas) }
}

#[test]
fn every_layout_and_micro_batch_trains_the_same_tied_model() {
    for start in [ModelStart::Model, ModelStart::Random] {
        let (expected, metrics) = Job::train(&full(start), tied(1, 1, 1));
        assert!(metrics.iter().all(|metrics| !metrics.skipped), "{metrics:?}");
        for (grid, micro_batch_rows, keep_activations) in [
            (tied(2, 2, 1), 25, true),
            (tied(4, 1, 2), 64, false),
            (Grid { shared_memory: true, ..tied(1, 2, 2) }, 30, true),
            (Grid { spread_head: true, activations: FloatType::Bf16, ..tied(2, 1, 1) }, 25, true),
        ] {
            let settings = TrainingSettings { micro_batch_rows, keep_activations, ..full(start) };
            let (tensors, own) = Job::train(&settings, grid);
            assert_eq!(own, metrics, "{start:?}, {grid:?}");
            assert!(tensors == expected, "{start:?}, {grid:?}");
        }
    }
}

#[test]
fn a_whole_model_resumes_on_another_layout_and_is_a_directory_that_can_be_served() {
    let settings = full(ModelStart::Model);
    let (expected, _) = Job::train(&settings, tied(1, 1, 1));
    let mut first = Job::start(tied(2, 2, 1));
    first.open(&settings, &SessionStart::New);
    let (_, shards) = first.steps(0..2);
    first.close();
    let mut alone = Job::start(tied(1, 1, 1));
    let served = serve(&alone.nodes[0].model);
    alone.open(&settings, &SessionStart::Resume { steps: 2, shards });
    let (_, shards) = alone.steps(2..3);
    assert_eq!(serve(&alone.nodes[0].model), served, "what serves does not move");
    alone.close();
    let mut second = Job::start(tied(2, 1, 2));
    second.open(&settings, &SessionStart::Resume { steps: 3, shards });
    let (_, shards) = second.steps(3..STEPS);
    second.give(&TrainingWork::Export { shards });
    let report = second.nodes[0].report(second.session);
    let TrainingReport::ModelExported { manifest, files, usable } = report else { panic!("{report:?}") };
    assert_eq!(usable, Ok(()));
    second.close();
    let manifest = WORLD.runtime.block_on(WORLD.blobs.get_manifest(manifest)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for file in &files {
        assert_eq!(manifest.get(&file.name).unwrap().blob, file.blob);
        let bytes = WORLD.bytes(file.blob);
        assert_eq!(bytes.len() as u64, file.bytes);
        std::fs::write(directory.path().join(&file.name), &bytes).unwrap();
    }
    let names: Vec<&str> = files.iter().map(|file| &file.name[..]).collect();
    let companions = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, [&["config.json"][..], &companions, &["model.safetensors"]].concat());
    assert!(std::fs::read(directory.path().join("model.safetensors")).unwrap() == expected);
    let config = ashlar_model::ModelConfig::from_dir(directory.path()).unwrap();
    assert_eq!(config.shape.weights.head, ashlar_vocabulary::WeightType::F32);
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    let slice = RankSlice::whole(&config.shape);
    let none = None::<Quantization>;
    StageModel::load(directory.path(), none, slice, kernels, &mut |_, _| {}).unwrap();
}

#[test]
fn a_whole_model_that_diverges_is_not_handed_out() {
    let settings = TrainingSettings { learning_rate: 1e38, norm_max: None, ..full(ModelStart::Random) };
    let mut job = Job::start(tied(1, 1, 1));
    job.open(&settings, &SessionStart::New);
    let (metrics, shards) = job.steps(0..STEPS);
    assert!(metrics.last().unwrap().skipped, "{metrics:?}");
    let (_, usable) = job.export(shards);
    job.close();
    assert!(usable.unwrap_err().contains("no number"));
}

#[test]
fn preferences_are_learnt_alike_on_every_layout() {
    let (expected, metrics) = Job::train(&preferences(), ONE);
    let (first, last) = (&metrics[0], &metrics[STEPS as usize - 1]);
    assert!((first.loss - std::f64::consts::LN_2).abs() < 1e-9, "{first:?}");
    assert_eq!((first.accuracy, first.rewards), (0.0, Some(Rewards { preferred: 0.0, non_preferred: 0.0 })));
    assert!(last.loss < first.loss && last.accuracy > 0.5, "{metrics:?}");
    assert!(last.rewards.is_some_and(|rewards| rewards.margin() > 0.0), "{last:?}");
    assert!(metrics.iter().all(|step| !step.skipped && step.gradient_norm > 0.0), "{metrics:?}");
    for (grid, micro_batch_rows, keep_activations) in [
        (grid(2, 1, 1), 40, true),
        (grid(2, 1, 1), 27, false),
        (grid(4, 1, 1), 27, true),
        (grid(1, 2, 1), 64, false),
        (grid(2, 2, 2), 30, true),
        (Grid { spread_head: true, shared_memory: true, ..grid(2, 2, 1) }, 27, true),
    ] {
        let settings = TrainingSettings { micro_batch_rows, keep_activations, ..preferences() };
        let (tensors, own) = Job::train(&settings, grid);
        assert_eq!(own, metrics, "{grid:?}");
        assert!(tensors == expected, "{grid:?}, {micro_batch_rows} rows, keep {keep_activations}");
    }
}

#[test]
fn what_is_no_pair_of_answers_is_refused_when_its_step_comes() {
    for wrong in [vec![answer(0, 0)], vec![answer(0, 0), answer(0, 1), answer(1, 0)]] {
        let samples = (0..13).map(|index| match index {
            12 => wrong.clone(),
            _ => vec![answer(index, 0), answer(index, 1)],
        });
        let dataset = WORLD.runtime.block_on(WORLD.blobs.put(&pairs(samples))).unwrap().id;
        let mut job = Job::start(ONE);
        job.open(&TrainingSettings { dataset, ..preferences() }, &SessionStart::New);
        // One epoch has every sample.
        (0..STEPS / 2).for_each(|step| job.give(&TrainingWork::Step { step }));
        let refused = loop {
            match job.nodes[0].report(job.session) {
                TrainingReport::Prepared { .. } => {}
                other => break other,
            }
        };
        let TrainingReport::Failed { message, retry: false } = refused else { panic!("{refused:?}") };
        assert!(message.contains("sample 12 is no pair"), "{message}");
    }
}

#[test]
fn narrow_activations_travel_between_stages_without_a_trace() {
    let narrow = Grid { activations: FloatType::Bf16, ..ONE };
    let expected = Job::train(&settings(), narrow);
    assert!(Job::train(&settings(), Grid { stages: 2, ..narrow }) == expected);
}

#[test]
fn a_job_resumes_on_another_layout_with_the_same_bits() {
    let (expected, _) = Job::train(&settings(), ONE);
    let mut start = SessionStart::New;
    let mut from = 0;
    for (grid, until) in [(grid(2, 2, 1), 2), (grid(1, 1, 2), 3), (grid(4, 1, 1), 4), (grid(1, 2, 2), STEPS)]
    {
        let mut job = Job::start(grid);
        job.open(&settings(), &start);
        let (_, shards) = job.steps(from..until);
        if until == STEPS {
            let (tensors, usable) = job.export(shards.clone());
            assert!(tensors == expected && usable.is_ok());
        }
        job.close();
        (start, from) = (SessionStart::Resume { steps: until, shards }, until);
    }
    // A state of another step is refused for good.
    let SessionStart::Resume { shards, .. } = start else { unreachable!() };
    let report = Job::start(ONE).ask(&settings(), &SessionStart::Resume { steps: 3, shards });
    assert!(matches!(&report[0], TrainingReport::Failed { retry: false, .. }), "{report:?}");
}

#[test]
fn validation_data_is_measured_alike_on_every_layout_and_changes_nothing() {
    let dataset = DatasetReader::open(Cursor::new(&WORLD.bytes[..])).unwrap();
    let steps_of = |samples: u32| 2 * u64::from(samples.div_ceil(5));
    let split = ashlar_dataset::plan::split(dataset.sizes(), 4, 11);
    let mut of_split = settings();
    of_split.validation = ValidationData::Split { examples: 4 };
    of_split.steps = steps_of(split.training.len() as u32);
    let mut of_file = settings();
    of_file.validation = ValidationData::File(WORLD.dataset);
    let mut of_pairs = preferences();
    of_pairs.validation = ValidationData::File(WORLD.pairs);
    for settings in [of_split, of_file, of_pairs] {
        let mut seen: Option<((f64, f64), (f64, f64))> = None;
        for (grid, rows, packing) in [
            (ONE, 64, true),
            (grid(2, 2, 1), 25, true),
            (grid(2, 1, 2), 30, true),
            (grid(2, 1, 1), 64, false),
        ] {
            let settings = TrainingSettings { micro_batch_rows: rows, packing, ..settings.clone() };
            let mut job = Job::start(grid);
            job.open(&settings, &SessionStart::New);
            let before = job.evaluate();
            job.steps(0..2);
            let after = job.evaluate();
            job.close_measured();
            assert!(before.0 > 0.0 && before.0 != after.0, "{before:?} {after:?}");
            assert_eq!(*seen.get_or_insert((before, after)), (before, after), "{grid:?}");
        }
    }
}

/// The same with such a share of dropout.
fn dropped(settings: TrainingSettings, dropout: f32) -> TrainingSettings {
    TrainingSettings { lora: LoraSettings { dropout, ..settings.lora.clone() }, ..settings }
}

#[test]
fn dropout_is_the_same_on_every_layout_and_after_a_resume() {
    for plain in [settings(), preferences()] {
        let settings = dropped(plain.clone(), 0.3);
        let (expected, metrics) = Job::train(&settings, ONE);
        assert!(expected != Job::train(&plain, ONE).0, "some inputs are not seen");
        assert!(metrics.iter().all(|step| !step.skipped), "{metrics:?}");
        for (grid, micro_batch_rows, keep_activations) in [
            (ONE, 30, false),
            (grid(2, 1, 1), 30, true),
            (grid(1, 2, 1), 64, false),
            (grid(2, 2, 2), 30, true),
            (grid(1, 1, 4), 30, true),
        ] {
            let settings = TrainingSettings { micro_batch_rows, keep_activations, ..settings.clone() };
            let (tensors, own) = Job::train(&settings, grid);
            assert_eq!(own, metrics, "{grid:?}");
            assert!(tensors == expected, "{grid:?}, {micro_batch_rows} rows, keep {keep_activations}");
        }
        let mut first = Job::start(grid(2, 1, 1));
        first.open(&settings, &SessionStart::New);
        let (_, shards) = first.steps(0..2);
        first.close();
        let mut second = Job::start(grid(1, 2, 1));
        second.open(&settings, &SessionStart::Resume { steps: 2, shards });
        let (_, shards) = second.steps(2..STEPS);
        let (tensors, usable) = second.export(shards);
        second.close();
        assert!(tensors == expected && usable.is_ok());
        // Another seed drops something else; a measurement drops nothing.
        let other = TrainingSettings { seed: 12, ..settings };
        assert!(Job::train(&other, ONE).0 != expected);
    }
}

#[test]
fn dropout_leaves_measurements_alone() {
    let mut validated = settings();
    validated.validation = ValidationData::File(WORLD.dataset);
    let measure = |settings: &TrainingSettings| {
        let mut job = Job::start(ONE);
        job.open(settings, &SessionStart::New);
        let measured = job.evaluate();
        job.close();
        measured
    };
    assert_eq!(measure(&dropped(validated.clone(), 0.5)), measure(&validated));
}

/// Serving's own pass over some tokens; its bits.
fn serve(model: &StageModel) -> Vec<u32> {
    let table = [BlockId(0)];
    let rows: Vec<_> = (0..6).map(|position| RowContext { position, block_table: &table }).collect();
    let (mut cache, mut work) = (model.kv_cache(1), model.workspace(6));
    let input = StageInput::Tokens(&[1, 2, 3, 4, 5, 6]);
    model.forward(&rows, input, &mut cache, &mut SingleRank, &mut work, &mut || ()).unwrap();
    work.activations(6).iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_link_that_breaks_in_a_step_ends_the_session_everywhere_and_serving_goes_on() {
    for (layout, breaks) in [(grid(2, 1, 2), 3), (grid(2, 2, 1), 40), (grid(1, 1, 4), 5)] {
        let mut job = Job::start(Grid { fault: Some((1, breaks)), ..layout });
        let served = job.nodes[0].model.slice().first.then(|| job.nodes[0].model.clone());
        let before = (layout.ranks == 1).then(|| serve(served.as_ref().unwrap()));
        job.open(&TrainingSettings { micro_batch_rows: 25, ..settings() }, &SessionStart::New);
        job.give(&TrainingWork::Step { step: 0 });
        // Whoever had prepared the first step fails in the second.
        job.give(&TrainingWork::Step { step: 1 });
        job.give(&TrainingWork::Step { step: 2 });
        let mut first: Option<Instant> = None;
        for node in &mut job.nodes {
            let message = loop {
                match node.report(job.session) {
                    TrainingReport::Prepared { .. } => {}
                    TrainingReport::Failed { message, retry: true } => break message,
                    other => panic!("{other:?}"),
                }
            };
            let since = first.get_or_insert_with(Instant::now).elapsed();
            assert!(since < Duration::from_secs(2), "{message} after {since:?}");
        }
        if let Some(before) = before {
            assert_eq!(serve(&served.unwrap()), before);
        }
        for node in &job.nodes[1..] {
            node.sessions.leave("the test is over", &mut || ());
            assert_eq!(Arc::strong_count(&node.model), 1, "the weights are given up");
        }
    }
}

#[test]
fn a_session_gives_the_weights_up_when_its_layout_ends_even_while_serving_computes() {
    let mut job = Job::start(grid(2, 1, 1));
    job.open(&settings(), &SessionStart::New);
    // Serving computes, so the step does not get far.
    let flags: Vec<YieldFlag> = job.nodes.iter().map(|node| node.urgent.clone()).collect();
    let raised = flags[1].raise();
    job.give(&TrainingWork::Step { step: 0 });
    std::thread::sleep(Duration::from_millis(50));
    drop(raised);
    let started = Instant::now();
    job.nodes[0].sessions.leave("the layout has changed", &mut || ());
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(Arc::strong_count(&job.nodes[0].model), 1);
    for node in &mut job.nodes {
        loop {
            match node.report(job.session) {
                TrainingReport::Prepared { .. } => {}
                TrainingReport::Failed { retry: true, .. } => break,
                other => panic!("{other:?}"),
            }
        }
    }
    // Without a place a session is refused, and may be tried again.
    let mut alone = Job::start(ONE);
    alone.nodes[0].sessions.end_all("released");
    let reports = alone.ask(&settings(), &SessionStart::New);
    assert!(matches!(&reports[0], TrainingReport::Failed { retry: true, .. }), "{reports:?}");
}

#[test]
fn a_loss_that_is_no_number_skips_the_step_everywhere() {
    let settings = TrainingSettings { learning_rate: 1e38, norm_max: None, ..settings() };
    let mut seen: Option<(Vec<bool>, Vec<u8>)> = None;
    for grid in [ONE, grid(2, 1, 2), grid(1, 2, 1)] {
        let mut job = Job::start(grid);
        job.open(&settings, &SessionStart::New);
        let (metrics, shards) = job.steps(0..STEPS);
        let skipped: Vec<bool> = metrics.iter().map(|metrics| metrics.skipped).collect();
        assert!(!skipped[0] && skipped[STEPS as usize - 1], "{metrics:?}");
        let (tensors, usable) = job.export(shards);
        job.close();
        let _ = usable;
        let own = (skipped, tensors);
        assert!(*seen.get_or_insert(own.clone()) == own, "{grid:?}");
    }
}

#[test]
fn what_can_never_work_is_refused_for_good() {
    let module = |name: &str| LoraSettings { targets: vec![name.into()], ..settings().lora };
    let cases: BTreeMap<&str, TrainingSettings> = BTreeMap::from([
        ("no module `lm_head`", TrainingSettings { lora: module("lm_head"), ..settings() }),
        ("1 is no dropout", dropped(settings(), 1.0)),
        ("NaN is no dropout", dropped(settings(), f32::NAN)),
        ("method supervised, the job's is dpo", TrainingSettings { dataset: WORLD.dataset, ..preferences() }),
        ("method dpo, the job's is supervised", TrainingSettings { dataset: WORLD.pairs, ..settings() }),
        (
            "method dpo, the job's is",
            TrainingSettings { validation: ValidationData::File(WORLD.pairs), ..settings() },
        ),
        ("-0.1 is no beta", TrainingSettings { method: TrainingMethod::Dpo { beta: -0.1 }, ..preferences() }),
        (
            "NaN is no beta",
            TrainingSettings { method: TrainingMethod::Dpo { beta: f64::NAN }, ..preferences() },
        ),
        ("larger micro-batches", TrainingSettings { micro_batch_rows: 8, ..settings() }),
        ("create the job again", TrainingSettings { steps: 99, ..settings() }),
        ("learning rate", TrainingSettings { learning_rate: f64::INFINITY, ..settings() }),
        ("is not stored", TrainingSettings { dataset: BlobId([9; 32]), ..settings() }),
    ]);
    let mut job = Job::start(ONE);
    for (text, settings) in cases {
        let reports = job.ask(&settings, &SessionStart::New);
        let [TrainingReport::Failed { message, retry: false }] = &reports[..] else {
            panic!("{text}: {reports:?}");
        };
        assert!(message.contains(text), "{text}: {message}");
    }
}
