//! The links of a spread head, with ranks as threads: slices arrive whole whichever way they travel, and a rank that goes is
//! noticed.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_identity::Transport;
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{HeadRanks, LogitColumns, RankSlice, StageModel};
use ashlar_protocol::data::LinkFaults;
use ashlar_protocol::membership::Assignment;
use ashlar_shard_node::beat::Beat;
use ashlar_shard_node::head::{HeadTransport, Wake};
use ashlar_shard_node::links::{self, LinkBreaker, LinkError, LinkSettings, Links, PendingLinks, Waiting};
use ashlar_vocabulary::{
    Bytes, FloatType, HeadSlice, LayerRange, LeaseTerm, ModelDigest, ModelShape, Precision, ReplicaId,
    ReplicaRevision, StageIndex, StepId, TensorRank,
};
use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Slices of odd and even width.
const VOCABULARY: usize = 1003;
/// Of a model of today, to measure with.
const LARGE_VOCABULARY: usize = 128_256;
const HIDDEN: usize = 32;
const LIMIT: Duration = Duration::from_secs(20);

fn settings(shared_memory: bool) -> LinkSettings {
    LinkSettings { faults: LinkFaults::default(), shared_memory, spin: Duration::ZERO }
}

/// The first of two stages, with its half of the head; and what holds all of it.
fn models(vocabulary: usize) -> (Arc<StageModel>, StageModel) {
    let directory = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "max_position_embeddings": 64,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    let path = directory.path().join("shape.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let model = directory.path().join("model");
    let shape = path.to_str().unwrap().to_owned();
    let request = SynthRequest { shape, dtype: FloatType::F32, seed: 3, tokenizer: None };
    let config = synthesize(&model, &request, &mut |_, _| {}).unwrap();
    let load = |slice| {
        let kernels = Arc::new(Kernels::new(Isa::best(), 1));
        StageModel::load(&model, Precision::default(), slice, kernels, &mut |_, _| {}).unwrap()
    };
    let whole = RankSlice::whole(&config.shape);
    let first = RankSlice {
        layers: LayerRange { start: 0, end: 1 },
        last: false,
        head: Some(HeadSlice { index: 0, of: 2 }),
        ..whole.clone()
    };
    (Arc::new(load(first)), load(whole))
}

fn assignment(stage: usize, addresses: &[String; 2]) -> Assignment {
    Assignment {
        term: LeaseTerm(1),
        holder: "test".into(),
        revision: ReplicaRevision(1),
        replica: ReplicaId(0),
        model: String::new(),
        model_digest: ModelDigest([0; 32]),
        precision: Precision::default(),
        stage: StageIndex(stage as u32),
        num_stages: 2,
        layers: LayerRange { start: stage, end: stage + 1 },
        tensor_rank: TensorRank(0),
        tensor_parallel_size: 1,
        kv_blocks: 0,
        boundary_log: false,
        max_num_batched_tokens: 0,
        group: vec![addresses[stage].clone()],
        next: (stage == 0).then(|| addresses[1].clone()),
        head: Some(HeadSlice { index: stage, of: 2 }),
        sampler: (stage == 0).then(|| addresses[1].clone()),
        sources: Vec::new(),
    }
}

/// Makes one rank's links, as a node's compute thread does.
fn connect(
    listener: TcpListener,
    assignment: &Assignment,
    shape: &ModelShape,
    settings: LinkSettings,
    wake: Wake,
) -> Result<(Links, LinkBreaker), LinkError> {
    let (arrivals, inbound) = mpsc::channel();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            if arrivals.send(links::accept(socket.unwrap(), &Transport::Plain).unwrap()).is_err() {
                return;
            }
        }
    });
    let mut pending = PendingLinks::connect(assignment, shape, settings, &Transport::Plain)?;
    let (mut waiting, started) = (Waiting::default(), Instant::now());
    while !pending.collect(&mut waiting) {
        assert!(started.elapsed() < LIMIT, "no agreement");
        if let Ok(arrived) = inbound.recv_timeout(Duration::from_millis(1)) {
            waiting.keep(arrived);
        }
    }
    let (out, _) = tokio::sync::mpsc::channel(1);
    let breaker = LinkBreaker::default();
    Ok((pending.finish(&breaker, &Beat::new(out), wake)?, breaker))
}

/// The rank that samples, and a thread that serves the other rank until its link ends or `answers` have been given.
struct Pair {
    sampler: Links,
    vocabulary: usize,
    /// Of the other rank's slice.
    width: usize,
    breaker: LinkBreaker,
    other: Option<std::thread::JoinHandle<(Bytes, Links)>>,
}

impl Pair {
    /// What the other rank reserves for the head, and its links, once it does not serve any more.
    fn join(&mut self) -> (Bytes, Links) {
        self.other.take().unwrap().join().unwrap()
    }
}

fn pair(model: &Arc<StageModel>, settings: [LinkSettings; 2], answers: usize) -> Pair {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [0, 1].map(|stage| listeners[stage].local_addr().unwrap().to_string());
    let [first, last] = listeners;
    let assignments = [0, 1].map(|stage| assignment(stage, &addresses));
    let [to_first, to_last] = assignments;
    let served = model.clone();
    let other = std::thread::spawn(move || {
        let (wakes, woken) = mpsc::channel();
        let wake = Wake::new(move || {
            let _ = wakes.send(());
        });
        let shape = served.config().shape.clone();
        let (mut links, _) = connect(first, &to_first, &shape, settings[0], wake).unwrap();
        let service = links.head_service.as_mut().unwrap();
        let bytes = service.bytes();
        for _ in 0..answers {
            let answered = woken.recv_timeout(LIMIT).map(|()| service.serve(&served));
            if !matches!(answered, Ok(Ok(()))) {
                break;
            }
        }
        (bytes, links)
    });
    let shape = model.config().shape.clone();
    let (sampler, breaker) = connect(last, &to_last, &shape, settings[1], Wake::new(|| ())).unwrap();
    Pair { sampler, vocabulary: shape.vocab_size, width: model.head_width(), breaker, other: Some(other) }
}

fn rows(count: usize, seed: usize) -> Vec<f32> {
    (0..count * HIDDEN).map(|index| ((index * 37 + seed * 101) % 113) as f32 / 57.0 - 1.0).collect()
}

/// The first slice of the logits of `rows`, over the links.
fn collect(links: &mut Pair, step: u64, rows: &[f32]) -> Result<Vec<f32>, String> {
    let mut logits = vec![f32::NAN; rows.len() / HIDDEN * links.vocabulary];
    collect_into(links, step, rows, &mut logits)?;
    Ok(logits)
}

fn collect_into(links: &mut Pair, step: u64, rows: &[f32], logits: &mut [f32]) -> Result<(), String> {
    let slice = LogitColumns::new(logits, links.vocabulary, 0..links.width);
    links.sampler.head_ranks.begin(StepId(step));
    links.sampler.head_ranks.hand_out(rows).map_err(|error| error.to_string())?;
    links.sampler.head_ranks.collect(0, slice).map_err(|error| error.to_string())
}

fn transport(links: &Links) -> HeadTransport {
    links.head_ranks.transports().next().unwrap()
}

#[test]
fn a_slice_has_the_same_bits_through_memory_over_a_socket_and_from_a_head_in_one_piece() {
    let (model, whole) = models(VOCABULARY);
    let counts = [1, 16, 3, LOGIT_ROWS_MAX];
    for shared in [true, false] {
        let mut pair = pair(&model, [settings(shared); 2], counts.len());
        assert_eq!(transport(&pair.sampler) == HeadTransport::SharedMemory, shared);
        for (step, count) in counts.into_iter().enumerate() {
            let rows = rows(count, step);
            let got = collect(&mut pair, step as u64, &rows).unwrap();
            let mut expected = vec![0.0; count * VOCABULARY];
            whole.head_slice(&rows, &mut expected);
            let width = model.head_width();
            for (got, expected) in got.chunks(VOCABULARY).zip(expected.chunks(VOCABULARY)) {
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got[..width]), bits(&expected[..width]), "{count} rows, shared: {shared}");
                assert!(got[width..].iter().all(|value| value.is_nan()), "another rank's columns");
            }
        }
        // What is reserved is said: shared memory by the rank that has made it.
        let slice = (4 * LOGIT_ROWS_MAX * model.head_width()) as u64;
        let of_links = pair.sampler.bytes().0;
        assert!((slice..slice + 8192).contains(&of_links), "{of_links} for a slice of {slice}");
        let row_buffers = (2 * 4 * LOGIT_ROWS_MAX * HIDDEN) as u64;
        let slices = if shared { slice } else { 2 * slice };
        assert_eq!(pair.join().0, Bytes(row_buffers + slices));
    }
}

#[test]
fn one_of_the_two_that_must_not_share_memory_and_the_slice_uses_the_socket() {
    let (model, _) = models(VOCABULARY);
    for wants in [[true, false], [false, true]] {
        let mut pair = pair(&model, wants.map(settings), 1);
        let HeadTransport::Socket { reason } = transport(&pair.sampler) else { panic!("memory: {wants:?}") };
        assert!(reason.contains("shared_memory"), "{reason}");
        collect(&mut pair, 1, &rows(2, 1)).unwrap();
    }
}

#[test]
fn a_rank_that_goes_or_a_broken_link_ends_the_wait_at_once() {
    let (model, _) = models(VOCABULARY);
    for shared in [true, false] {
        // It answers one time only.
        let mut gone = pair(&model, [settings(shared); 2], 1);
        collect(&mut gone, 1, &rows(1, 1)).unwrap();
        drop(gone.join());
        let started = Instant::now();
        let error = collect(&mut gone, 2, &rows(1, 1)).unwrap_err();
        assert!(error.contains("slice 0 of the head"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());

        let mut broken = pair(&model, [settings(shared); 2], 2);
        collect(&mut broken, 1, &rows(1, 1)).unwrap();
        broken.breaker.break_all();
        assert!(collect(&mut broken, 2, &rows(1, 1)).is_err());
        drop(broken.join());
    }
}

#[test]
fn faults_break_the_shared_path_too() {
    let (model, _) = models(VOCABULARY);
    let faulty = LinkSettings { faults: LinkFaults { delay_us: 0, break_after: 2 }, ..settings(true) };
    let mut pair = pair(&model, [faulty, settings(true)], 5);
    for step in 1..=2 {
        collect(&mut pair, step, &rows(1, 1)).unwrap();
    }
    assert!(collect(&mut pair, 3, &rows(1, 1)).is_err());
    drop(pair.join());
}

#[test]
#[ignore = "measures; run it on a quiet machine"]
fn latency() {
    const ROUNDS: usize = 60;
    let (model, _) = models(LARGE_VOCABULARY);
    for count in [1, 16, LOGIT_ROWS_MAX] {
        let rows = rows(count, 1);
        let mut computed = vec![0.0; count * model.head_width()];
        let mut logits = vec![0.0; count * LARGE_VOCABULARY];
        let median = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let mut pairs = [true, false].map(|shared| pair(&model, [settings(shared); 2], ROUNDS));
        let mut times = [const { Vec::new() }; 3];
        for round in 0..ROUNDS {
            let mut timed = |kind: usize, work: &mut dyn FnMut()| {
                let started = Instant::now();
                work();
                times[kind].push(started.elapsed().as_secs_f64() * 1e3);
            };
            for (way, pair) in pairs.iter_mut().enumerate() {
                timed(way, &mut || collect_into(pair, round as u64, &rows, &mut logits).unwrap());
            }
            timed(2, &mut || model.head_slice(&rows, &mut computed));
        }
        let [memory, sockets, computing] = times.each_mut().map(median);
        println!(
            "{count:>2} rows: memory {memory:.2} ms, socket {sockets:.2} ms, of which computing {computing:.2} ms"
        );
    }
}
