//! Ranks of a group as threads, over the links that nodes make: what they agree on, and how an exchange ends.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_identity::Transport;
use ashlar_model::{Collective, CollectiveError};
use ashlar_protocol::data::LinkFaults;
use ashlar_protocol::membership::{Assignment, FromNode};
use ashlar_shard_node::beat::Beat;
use ashlar_shard_node::group::{Group, GroupTransport};
use ashlar_shard_node::head::Wake;
use ashlar_shard_node::links::{self, LinkBreaker, LinkError, LinkSettings, PendingLinks, Waiting};
use ashlar_vocabulary::{
    FloatType, LayerRange, LayerVectors, LeaseTerm, ModelDigest, ModelShape, Precision, ReplicaId,
    ReplicaRevision, StageIndex, StepId, TensorRank, WeightType, WeightTypes,
};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The best of some attempts must be below this: the machine may be busy, but nobody has slept a time-out.
const AT_ONCE: Duration = Duration::from_millis(40);

fn settings(shared_memory: bool) -> LinkSettings {
    LinkSettings { faults: LinkFaults::default(), shared_memory, spin: Duration::from_micros(20) }
}

/// Of a model that nobody here loads: only the head's rows are of interest.
fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 8,
        intermediate_size: 8,
        num_layers: 2,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 1,
        vocab_size: 1000,
        max_position_embeddings: 16,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 2),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

struct Rank {
    group: Group,
    breaker: LinkBreaker,
    beats: tokio::sync::mpsc::Receiver<FromNode>,
}

fn assignment(rank: usize, addresses: &[String]) -> Assignment {
    Assignment {
        term: LeaseTerm(1),
        holder: "test".into(),
        revision: ReplicaRevision(1),
        replica: ReplicaId(0),
        model: String::new(),
        model_digest: ModelDigest([0; 32]),
        precision: Precision::default(),
        stage: StageIndex(0),
        num_stages: 1,
        layers: LayerRange { start: 0, end: 1 },
        tensor_rank: TensorRank(rank as u32),
        tensor_parallel_size: addresses.len() as u32,
        kv_blocks: 0,
        boundary_log: false,
        max_num_batched_tokens: 0,
        group: addresses.to_vec(),
        next: None,
        head: None,
        sampler: None,
        sources: Vec::new(),
    }
}

/// Makes one rank's links, as a node's compute thread does.
fn connect(
    listener: TcpListener,
    assignment: &Assignment,
    settings: LinkSettings,
) -> Result<Rank, LinkError> {
    let (arrivals, inbound) = mpsc::channel();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            if arrivals.send(links::accept(socket.unwrap(), &Transport::Plain).unwrap()).is_err() {
                return;
            }
        }
    });
    let mut pending = PendingLinks::connect(assignment, &shape(), settings, &Transport::Plain)?;
    let (mut waiting, started) = (Waiting::default(), Instant::now());
    while !pending.collect(&mut waiting) {
        assert!(started.elapsed() < Duration::from_secs(20), "no agreement");
        if let Ok(arrived) = inbound.recv_timeout(Duration::from_millis(1)) {
            waiting.keep(arrived);
        }
    }
    let (out, beats) = tokio::sync::mpsc::channel(64);
    let breaker = LinkBreaker::default();
    let group = pending.finish(&breaker, &Beat::new(out), Wake::new(|| ()))?.group;
    Ok(Rank { group, breaker, beats })
}

fn group(settings: &[LinkSettings]) -> Vec<Rank> {
    let listeners: Vec<TcpListener> =
        settings.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> =
        listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    let connecting: Vec<_> = listeners
        .into_iter()
        .zip(settings.to_vec())
        .enumerate()
        .map(|(rank, (listener, settings))| {
            let assignment = assignment(rank, &addresses);
            std::thread::spawn(move || connect(listener, &assignment, settings).unwrap())
        })
        .collect();
    connecting.into_iter().map(|rank| rank.join().unwrap()).collect()
}

fn exchange(group: &mut Group, step: u64, length: usize) -> Result<Vec<f32>, CollectiveError> {
    group.begin(StepId(step));
    let own: Vec<f32> = (0..length).map(|index| (group.rank() * 1_000_000 + index) as f32).collect();
    let mut all = vec![0.0; length * group.size()];
    group.all_gather(&own, &mut all)?;
    let lengths: Vec<usize> = (0..group.size()).map(|rank| length.saturating_sub(rank)).collect();
    let mut gathered = vec![0.0; if group.rank() == 0 { lengths.iter().sum() } else { 0 }];
    group.gather(&own[..lengths[group.rank()]], &lengths, &mut gathered)?;
    all.extend(gathered);
    Ok(all)
}

/// Every rank's results of some steps, rank by rank.
fn results(ranks: Vec<Rank>) -> Vec<Vec<Vec<f32>>> {
    let running: Vec<_> = ranks
        .into_iter()
        .map(|mut rank| {
            let lengths = [1, 7, 0, 64, 8192, 40_000, 100_001];
            std::thread::spawn(move || {
                let steps = lengths.iter().enumerate();
                let results = steps
                    .map(|(step, &length)| exchange(&mut rank.group, step as u64, length).unwrap())
                    .collect();
                // Kept until all are done: a rank that leaves ends the group.
                (rank, results)
            })
        })
        .collect();
    let done: Vec<(Rank, Vec<Vec<f32>>)> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
    done.into_iter().map(|(_, results)| results).collect()
}

fn shares_memory(rank: &Rank) -> bool {
    matches!(rank.group.transport(), Some(GroupTransport::SharedMemory { .. }))
}

#[test]
fn memory_and_sockets_bring_the_same_values() {
    for size in [2, 4, 8] {
        let shared = group(&vec![settings(true); size]);
        assert!(shared.iter().all(shares_memory));
        let sockets = group(&vec![settings(false); size]);
        assert!(!sockets.iter().any(shares_memory));
        assert_eq!(results(shared), results(sockets), "{size} ranks");
    }
}

#[test]
fn one_rank_that_must_not_share_memory_and_all_use_sockets() {
    for size in [2, 4] {
        for refusing in 0..size {
            let wants: Vec<LinkSettings> = (0..size).map(|rank| settings(rank != refusing)).collect();
            let ranks = group(&wants);
            for rank in &ranks {
                let Some(GroupTransport::Sockets { reason, .. }) = rank.group.transport() else {
                    panic!("rank {} uses memory", rank.group.rank());
                };
                let own = rank.group.rank() == refusing && refusing > 0;
                assert!(
                    reason.contains("shared_memory") && (own || reason.contains(&refusing.to_string())),
                    "{reason}"
                );
            }
            results(ranks);
        }
    }
}

#[test]
fn a_rank_alone_has_no_transport() {
    let mut ranks = group(&[settings(true)]);
    assert_eq!(ranks[0].group.transport(), None);
    assert_eq!(exchange(&mut ranks[0].group, 1, 3).unwrap().len(), 6);
}

/// Lets rank 0 of two wait, does something to end the wait, and returns the error with how long it took.
fn interrupted(end: impl Fn(Rank, LinkBreaker)) -> (Duration, CollectiveError) {
    let mut best: Option<(Duration, CollectiveError)> = None;
    for _ in 0..5 {
        let mut ranks = group(&[settings(true), settings(true)]);
        assert!(shares_memory(&ranks[0]));
        let (other, mut waiting) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let breaker = waiting.breaker.clone();
        let wait = std::thread::spawn(move || {
            let error = exchange(&mut waiting.group, 1, 100).unwrap_err();
            (Instant::now(), error)
        });
        std::thread::sleep(Duration::from_millis(30));
        let at = Instant::now();
        end(other, breaker);
        let (ended, error) = wait.join().unwrap();
        let took = ended.saturating_duration_since(at);
        if best.as_ref().is_none_or(|(best, _)| took < *best) {
            best = Some((took, error));
        }
    }
    best.unwrap()
}

#[test]
fn a_rank_that_goes_ends_the_wait_at_once_and_is_named() {
    let (took, error) = interrupted(|other, _| drop(other));
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(error.rank, 1);
    assert!(error.reason.contains("closed"), "{error}");
}

#[test]
fn the_breaker_ends_the_wait_at_once() {
    let kept = std::sync::Mutex::new(Vec::new());
    let (took, error) = interrupted(|other, breaker| {
        breaker.break_all();
        kept.lock().unwrap().push(other);
    });
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(error.rank, 1);
}

#[test]
fn a_waiting_rank_beats() {
    let mut ranks = group(&[settings(true), settings(true)]);
    let (mut other, mut waiting) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let wait = std::thread::spawn(move || {
        exchange(&mut waiting.group, 1, 100).unwrap();
        waiting.beats
    });
    std::thread::sleep(Duration::from_millis(700));
    exchange(&mut other.group, 1, 100).unwrap();
    let mut beats = wait.join().unwrap();
    let mut count = 0;
    while let Ok(FromNode::Beat) = beats.try_recv() {
        count += 1;
    }
    assert!(count >= 2, "{count} beats in 700 ms");
}

#[test]
fn faults_delay_and_break_the_shared_path_too() {
    let faulty = |faults| [settings(true), LinkSettings { faults, ..settings(true) }];
    let mut ranks = group(&faulty(LinkFaults { delay_us: 30_000, break_after: 0 }));
    let (mut slow, mut quick) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let running = std::thread::spawn(move || exchange(&mut slow.group, 1, 10).map(|_| slow));
    let started = Instant::now();
    exchange(&mut quick.group, 1, 10).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(60), "two exchanges: {:?}", started.elapsed());
    drop(running.join().unwrap().unwrap());

    let mut ranks = group(&faulty(LinkFaults { delay_us: 0, break_after: 3 }));
    let (mut breaking, mut other) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let running = std::thread::spawn(move || {
        let first = exchange(&mut breaking.group, 1, 10);
        (first, exchange(&mut breaking.group, 2, 10))
    });
    let mut done = Ok(Vec::new());
    for step in 1..=3 {
        done = exchange(&mut other.group, step, 10);
        if done.is_err() {
            break;
        }
    }
    let error = done.unwrap_err();
    assert_eq!(error.rank, 1, "{error}");
    let (first, second) = running.join().unwrap();
    assert!(first.is_ok());
    assert!(second.unwrap_err().reason.contains("on purpose"));
}

#[test]
fn a_rank_that_goes_before_the_agreement_fails_the_others() {
    let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> =
        listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    let mut listeners = listeners.into_iter();
    let leading = {
        let (listener, assignment) = (listeners.next().unwrap(), assignment(0, &addresses));
        std::thread::spawn(move || connect(listener, &assignment, settings(true)).map(|_| ()))
    };
    // Connects as a rank does, but goes before it has answered.
    drop(
        PendingLinks::connect(&assignment(1, &addresses), &shape(), settings(true), &Transport::Plain)
            .unwrap(),
    );
    let error = leading.join().unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Agreement(_)), "{error}");
    assert!(error.to_string().contains("rank 1"), "{error}");
}

#[test]
#[ignore = "measures; run it on a quiet machine"]
fn latency() {
    for size in [2, 4] {
        for kilobytes in [1, 8, 64, 1024] {
            let mut medians = Vec::new();
            for shared in [true, false] {
                let wanted = LinkSettings { spin: Duration::from_micros(200), ..settings(shared) };
                let running: Vec<_> = group(&vec![wanted; size])
                    .into_iter()
                    .map(|mut rank| std::thread::spawn(move || measure(&mut rank.group, kilobytes << 8)))
                    .collect();
                let times: Vec<f64> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
                medians.push(times[0]);
            }
            println!(
                "{size} ranks, {kilobytes:>4} KB: memory {:.1} µs, sockets {:.1} µs",
                medians[0], medians[1]
            );
        }
    }
}

/// The median exchange in microseconds.
fn measure(group: &mut Group, length: usize) -> f64 {
    let own = vec![1.0f32; length];
    let mut all = vec![0.0; length * group.size()];
    let mut times: Vec<f64> = (0..2000)
        .map(|_| {
            let started = Instant::now();
            group.all_gather(&own, &mut all).unwrap();
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
