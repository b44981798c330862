//! The group's exchange over its connections: between hosts, between containers, and wherever memory is not shared.

use crate::beat::Beat;
use ashlar_identity::Socket;
use ashlar_model::CollectiveError;
use ashlar_protocol::data::{DataLink, LinkFaults, PayloadHeader, PayloadKind};
use ashlar_protocol::frame::FrameError;
use ashlar_vocabulary::{ReplicaRevision, StepId};
use std::collections::BTreeMap;
use std::io;

/// Values per exchange: small enough that both sides may send before either receives.
const EXCHANGE_VALUES: usize = 8 << 10;

/// A rank's connections to all others.
#[derive(Debug)]
pub(super) struct SocketGroup {
    rank: usize,
    revision: ReplicaRevision,
    step: StepId,
    sequence: u32,
    peers: BTreeMap<usize, DataLink>,
    scratch: Vec<f32>,
    beat: Beat,
}

impl SocketGroup {
    pub(super) fn new(
        rank: usize,
        revision: ReplicaRevision,
        sockets: BTreeMap<usize, Socket>,
        faults: LinkFaults,
        beat: Beat,
    ) -> io::Result<SocketGroup> {
        let mut peers = BTreeMap::new();
        for (peer, socket) in sockets {
            peers.insert(peer, DataLink::new(socket, faults)?);
        }
        Ok(SocketGroup { rank, revision, step: StepId(0), sequence: 0, peers, scratch: Vec::new(), beat })
    }

    /// Starts counting exchanges for `step`.
    pub(super) fn begin(&mut self, step: StepId) {
        (self.step, self.sequence) = (step, 0);
    }

    fn size(&self) -> usize {
        self.peers.len() + 1
    }

    fn header(&mut self) -> PayloadHeader {
        self.sequence += 1;
        PayloadHeader {
            kind: PayloadKind::Collective,
            revision: self.revision,
            step: self.step,
            sequence: self.sequence,
        }
    }

    fn with_peer<R>(
        &mut self,
        peer: usize,
        exchange: impl FnOnce(&mut DataLink) -> Result<R, FrameError>,
    ) -> Result<R, CollectiveError> {
        let lost = |reason: String| CollectiveError { rank: peer, reason };
        let link = self.peers.get_mut(&peer).ok_or_else(|| lost("not connected".into()))?;
        exchange(link).map_err(|error| lost(error.to_string()))
    }

    /// Pairs meet in rounds (`partner = rank ⊕ round`) and exchange chunk by chunk, so that no two ranks ever wait for
    /// each other to read.
    pub(super) fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        all[self.rank * own.len()..(self.rank + 1) * own.len()].copy_from_slice(own);
        let beat = self.beat.clone();
        for (index, chunk) in own.chunks(EXCHANGE_VALUES).enumerate() {
            let header = self.header();
            for round in 1..self.size() {
                let peer = self.rank ^ round;
                let at = peer * own.len() + index * EXCHANGE_VALUES;
                let target = &mut all[at..at + chunk.len()];
                self.with_peer(peer, |link| {
                    link.send(header, chunk)?;
                    link.receive(header, target, &mut || beat.tick())
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn gather(
        &mut self,
        own: &[f32],
        lengths: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let header = self.header();
        if self.rank > 0 {
            return self.with_peer(0, |link| link.send(header, own));
        }
        all[..own.len()].copy_from_slice(own);
        let mut at = own.len();
        let beat = self.beat.clone();
        for (peer, &length) in lengths.iter().enumerate().skip(1) {
            let mut scratch = std::mem::take(&mut self.scratch);
            scratch.resize(length, 0.0);
            self.with_peer(peer, |link| link.receive(header, &mut scratch, &mut || beat.tick()))?;
            all[at..at + length].copy_from_slice(&scratch);
            self.scratch = scratch;
            at += length;
        }
        Ok(())
    }
}
