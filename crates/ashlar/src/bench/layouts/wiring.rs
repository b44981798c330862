//! The links of a layout: the very connections that nodes make, over loopback.

use anyhow::{Context, Result, bail};
use ashlar_identity::Transport;
use ashlar_model::RankSlice;
use ashlar_protocol::membership::Assignment;
use ashlar_shard_node::beat::Beat;
use ashlar_shard_node::group::GroupTransport;
use ashlar_shard_node::head::{HeadTransport, Wake};
use ashlar_shard_node::links::{self, Inbound, LinkBreaker, LinkSettings, Links, PendingLinks, Waiting};
use ashlar_vocabulary::{
    LeaseTerm, ModelDigest, ModelShape, Precision, ReplicaId, ReplicaRevision, StageIndex, TensorRank,
};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The one layout that a bench's links belong to.
pub(super) const REVISION: ReplicaRevision = ReplicaRevision(1);
/// How long ranks may take to connect, on a busy machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a group's agreement is looked at.
const AGREEMENT_POLL: Duration = Duration::from_millis(1);

/// Where a rank listens.
#[derive(Debug)]
pub(super) struct Port {
    listener: TcpListener,
    address: String,
}

impl Port {
    /// A free port of this machine.
    pub(super) fn open() -> Result<Port> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
        let address = listener.local_addr()?.to_string();
        Ok(Port { listener, address })
    }

    /// Where its peers reach it.
    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

/// Whom a rank speaks to.
#[derive(Debug)]
pub(super) struct Place {
    /// Its stage.
    pub(super) stage: usize,
    /// In which precision the model is held.
    pub(super) precision: Precision,
    /// Addresses of its stage's ranks.
    pub(super) group: Vec<String>,
    /// Address of the same rank in the next stage.
    pub(super) next: Option<String>,
    /// Address of the rank that gets the logits, where an earlier stage holds rows of the head.
    pub(super) sampler: Option<String>,
}

/// Makes the links of the rank with `slice`; `wake` is called when rows for its slice of the head arrive. Blocks until all stand, so every rank needs a thread of its own here.
pub(super) fn connect(
    port: Port,
    (slice, shape): (&RankSlice, &ModelShape),
    place: Place,
    settings: LinkSettings,
    breaker: &LinkBreaker,
    wake: Wake,
) -> Result<Links> {
    let assignment = Assignment {
        term: LeaseTerm(1),
        holder: "bench".to_owned(),
        revision: REVISION,
        replica: ReplicaId(0),
        model: String::new(),
        precision: place.precision,
        model_digest: ModelDigest([0; 32]),
        stage: StageIndex(place.stage as u32),
        num_stages: 2,
        layers: slice.layers,
        tensor_rank: TensorRank(slice.tensor_rank as u32),
        tensor_parallel_size: slice.tensor_parallel_size as u32,
        kv_blocks: 0,
        boundary_log: false,
        max_num_batched_tokens: 0,
        group: place.group,
        next: place.next,
        head: slice.head,
        sampler: place.sampler,
        sources: Vec::new(),
    };
    let samples = slice.last && slice.tensor_rank == 0;
    let slices = slice.head.filter(|_| samples).map_or(0, |head| head.of - slice.tensor_parallel_size);
    let group = slice.tensor_parallel_size - 1 - slice.tensor_rank;
    let expected = usize::from(place.stage > 0) + group + slices;
    let inbound = accept_in_background(port.listener, expected);
    let mut pending = PendingLinks::connect(&assignment, shape, settings, &Transport::Plain)
        .context("cannot reach another rank")?;
    let (mut waiting, deadline) = (Waiting::default(), Instant::now() + CONNECT_TIMEOUT);
    while !pending.collect(&mut waiting) {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if pending.is_connected() && !remaining.is_zero() {
            // Only the group's agreement is missing, which ends by itself.
            std::thread::sleep(AGREEMENT_POLL);
            continue;
        }
        match inbound.recv_timeout(remaining) {
            Ok(arrived) => waiting.keep(arrived?),
            Err(_) => bail!("another rank did not connect within {} s", CONNECT_TIMEOUT.as_secs()),
        }
    }
    // Nobody listens to the signs of life here.
    let (beats, _) = tokio::sync::mpsc::channel(1);
    let links = pending.finish(breaker, &Beat::new(beats), wake).context("a link broke while it was made")?;
    // A figure must not stand under the wrong name.
    let group = links.group.transport().and_then(|way| match way {
        GroupTransport::Sockets { reason, .. } => Some(reason),
        GroupTransport::SharedMemory { .. } => None,
    });
    let mut head = links.head_ranks.transports().filter_map(|way| match way {
        HeadTransport::Socket { reason } => Some(reason),
        HeadTransport::SharedMemory => None,
    });
    if let (true, Some(reason)) = (settings.shared_memory, group.or_else(|| head.next())) {
        bail!("the ranks cannot share memory ({reason}): measure with --transport tcp");
    }
    drop(head);
    Ok(links)
}

/// Accepts `expected` connections on a thread of its own, because a peer waits for our greeting while we wait for its.
fn accept_in_background(listener: TcpListener, expected: usize) -> mpsc::Receiver<Result<Inbound>> {
    let (arrivals, inbound) = mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..expected {
            let accepted = listener.accept().context("cannot accept a rank").and_then(|(socket, _)| {
                links::accept(socket, &Transport::Plain).context("a rank was not understood")
            });
            if arrivals.send(accepted).is_err() {
                return;
            }
        }
    });
    inbound
}
