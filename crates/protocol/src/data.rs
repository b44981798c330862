//! Rank to rank: activations from stage to stage, partial sums within a tensor-parallel group, rows for the head and their
//! logits.
//!
//! A fixed 48-byte header and raw little-endian values, `f32` but for activations where a narrower type was chosen; no
//! serialisation of tensors. Blocking sockets: the compute
//! thread itself sends and receives. [`LinkFaults`] lets a test slow a link down or break it.

use crate::frame::FrameError;
use crate::membership::BEAT_INTERVAL_MS;
use ashlar_identity::Socket;
use ashlar_vocabulary::{FloatType, LeaseTerm, ReplicaRevision, SessionId, StepId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::time::Duration;

/// First message of a data connection (after the version greeting): which link this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkHello {
    /// The connecting rank's lease.
    pub term: LeaseTerm,
    /// Its layout.
    pub revision: ReplicaRevision,
    /// What the connection carries.
    pub purpose: LinkPurpose,
}

/// What a data connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkPurpose {
    /// Activations from the same rank of the previous stage.
    Activations,
    /// Partial sums from this higher rank of the same group.
    Group {
        /// The connecting rank.
        rank: u32,
    },
    /// Something of a fine-tuning session.
    Training {
        /// Which session.
        session: SessionId,
        /// What.
        link: TrainingLink,
    },
    /// Rows for the head and back their logits: from a rank of an earlier stage to the rank that samples.
    Head {
        /// The connecting rank's slice.
        index: u32,
    },
    /// Files of the model, see [`crate::files`].
    Files,
}

/// What a data connection of a fine-tuning session carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainingLink {
    /// Activations from the same rank of the previous stage, and their gradients back.
    Stage,
    /// Partial sums from this higher rank of the same group.
    Group {
        /// The connecting rank.
        rank: u32,
    },
    /// Gradients from the same rank of this higher replica.
    Replica {
        /// The connecting rank's replica.
        replica: u32,
    },
}

/// What a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadKind {
    /// Rows of the residual stream, as elements of this type. Everything else is `f32`.
    Activations(FloatType),
    /// One rank's contribution to a collective.
    Collective,
    /// Normed rows whose logits are wanted.
    HeadRows,
    /// One slice of the logits of those rows.
    Logits,
    /// Gradients by rows that went the other way on the same connection.
    Gradients,
    /// What ranks of a training step tell one another beside numbers: words.
    TrainingFacts,
}

impl PayloadKind {
    /// Its number in a header.
    const fn code(self) -> u32 {
        match self {
            PayloadKind::Activations(FloatType::F32) => 1,
            PayloadKind::Collective => 2,
            PayloadKind::HeadRows => 3,
            PayloadKind::Logits => 4,
            PayloadKind::Activations(FloatType::Bf16) => 5,
            PayloadKind::Activations(FloatType::F16) => 6,
            PayloadKind::Gradients => 7,
            PayloadKind::TrainingFacts => 8,
        }
    }
}

/// Names a payload; a receiver that expects another one drops the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayloadHeader {
    /// What it is.
    pub kind: PayloadKind,
    /// The layout it belongs to.
    pub revision: ReplicaRevision,
    /// The step it belongs to.
    pub step: StepId,
    /// Counts payloads within the step.
    pub sequence: u32,
}

const HEADER_BYTES: usize = 48;
const MAGIC: u32 = 0x4853_4141;
/// Longest payload.
const PAYLOAD_BYTES_MAX: usize = 1 << 30;

/// Deliberate trouble on a link, for tests and drills.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LinkFaults {
    /// Added before each send.
    pub delay_us: u64,
    /// Break the connection instead of the n-th send (0: never).
    pub break_after: u64,
}

/// One data connection.
#[derive(Debug)]
pub struct DataLink {
    socket: Socket,
    faults: LinkFaults,
    sent: u64,
}

impl DataLink {
    /// Wraps a greeted socket.
    pub fn new(socket: impl Into<Socket>, faults: LinkFaults) -> io::Result<DataLink> {
        let socket = socket.into();
        crate::frame::tune(socket.tcp())?;
        socket.set_read_timeout(Some(Duration::from_millis(BEAT_INTERVAL_MS)))?;
        Ok(DataLink { socket, faults, sent: 0 })
    }

    /// How long a read waits before `idle` is called; [`BEAT_INTERVAL_MS`] unless told.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(patience))
    }

    /// Ends the connection, for both sides and for every handle on it.
    pub fn shutdown(&self) {
        // A link that is closed already is as broken as it can be.
        let _ = self.socket.shutdown();
    }

    /// Sends `values`.
    pub fn send(&mut self, header: PayloadHeader, values: &[f32]) -> Result<(), FrameError> {
        self.send_bytes(header, bytemuck::cast_slice(values))
    }

    /// Sends a payload that is encoded already.
    pub fn send_bytes(&mut self, header: PayloadHeader, payload: &[u8]) -> Result<(), FrameError> {
        self.sent += 1;
        if self.faults.delay_us > 0 {
            std::thread::sleep(Duration::from_micros(self.faults.delay_us));
        }
        if self.faults.break_after > 0 && self.sent > self.faults.break_after {
            let _ = self.socket.shutdown();
            return Err(FrameError::Io(io::ErrorKind::ConnectionAborted.into()));
        }
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&header.kind.code().to_le_bytes());
        bytes[8..16].copy_from_slice(&header.revision.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&header.step.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&header.sequence.to_le_bytes());
        bytes[28..36].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes[36..40].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..40]);
        bytes[40..44].copy_from_slice(&checksum.to_le_bytes());
        self.write_both(&bytes, payload)
    }

    /// One vectored write where the socket takes it, so that header and payload share a segment.
    fn write_both(&mut self, header: &[u8], payload: &[u8]) -> Result<(), FrameError> {
        let total = header.len() + payload.len();
        let mut written = 0;
        while written < total {
            let count = if written < header.len() {
                let parts = [io::IoSlice::new(&header[written..]), io::IoSlice::new(payload)];
                self.socket.write_vectored(&parts)
            } else {
                self.socket.write(&payload[written - header.len()..])
            };
            match count {
                Ok(0) => return Err(FrameError::Io(io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FrameError::Io(error)),
            }
        }
        Ok(())
    }

    /// Receives exactly the payload `expected`, into `values`, whose length must match. `idle` is called whenever the
    /// socket's read time-out passes without data, so that a waiting rank can say that it lives; its error ends the wait.
    pub fn receive(
        &mut self,
        expected: PayloadHeader,
        values: &mut [f32],
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        self.receive_bytes(expected, bytemuck::cast_slice_mut(values), idle)
    }

    /// [`DataLink::receive`] without decoding.
    pub fn receive_bytes(
        &mut self,
        expected: PayloadHeader,
        payload: &mut [u8],
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        let announced = self.read_header(idle)?;
        let matches = announced.kind == expected.kind.code()
            && announced.revision == expected.revision
            && announced.step == expected.step
            && announced.sequence == expected.sequence
            && announced.length == payload.len();
        if !matches {
            return Err(unexpected());
        }
        self.read_payload(&announced, payload, idle)
    }

    /// Receives the next payload of this kind and layout, whatever its step, into `values`, which becomes as long as the
    /// payload: a multiple of `unit`, between one and `units_max` of them. Returns its step and sequence.
    pub fn receive_any(
        &mut self,
        (kind, revision): (PayloadKind, ReplicaRevision),
        (unit, units_max): (usize, usize),
        values: &mut Vec<f32>,
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(StepId, u32), FrameError> {
        let announced = self.read_header(idle)?;
        let unit = unit.saturating_mul(size_of::<f32>());
        let whole = announced.length.checked_rem(unit) == Some(0);
        let bounded = announced.length > 0 && announced.length <= unit.saturating_mul(units_max);
        if announced.kind != kind.code() || announced.revision != revision || !whole || !bounded {
            return Err(unexpected());
        }
        values.resize(announced.length / size_of::<f32>(), 0.0);
        self.read_payload(&announced, bytemuck::cast_slice_mut(values), idle)?;
        Ok((announced.step, announced.sequence))
    }

    fn read_header(
        &mut self,
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<Announced, FrameError> {
        let mut bytes = [0u8; HEADER_BYTES];
        self.read_full(&mut bytes, idle)?;
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC || u32_at(40) != crc32fast::hash(&bytes[..40]) {
            return Err(FrameError::Corrupt);
        }
        let length = u64_at(28) as usize;
        if length > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong { announced: length });
        }
        Ok(Announced {
            kind: u32_at(4),
            revision: ReplicaRevision(u64_at(8)),
            step: StepId(u64_at(16)),
            sequence: u32_at(24),
            length,
            checksum: u32_at(36),
        })
    }

    fn read_payload(
        &mut self,
        announced: &Announced,
        payload: &mut [u8],
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        self.read_full(payload, idle)?;
        if crc32fast::hash(payload) != announced.checksum {
            return Err(FrameError::Corrupt);
        }
        Ok(())
    }

    fn read_full(
        &mut self,
        mut buffer: &mut [u8],
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        while !buffer.is_empty() {
            match self.socket.read(buffer) {
                Ok(0) => return Err(FrameError::Closed),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => idle()?,
                    _ => return Err(FrameError::Io(error)),
                },
            }
        }
        Ok(())
    }
}

/// What a header says that has arrived whole.
struct Announced {
    kind: u32,
    revision: ReplicaRevision,
    step: StepId,
    sequence: u32,
    /// In bytes.
    length: usize,
    checksum: u32,
}

fn unexpected() -> FrameError {
    FrameError::Io(io::Error::new(
        io::ErrorKind::InvalidData,
        "payload of another step or shape: reconnect and replay",
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn pair(faults: LinkFaults) -> (DataLink, DataLink) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (inward, _) = listener.accept().unwrap();
        (DataLink::new(out, faults).unwrap(), DataLink::new(inward, LinkFaults::default()).unwrap())
    }

    fn header(step: u64) -> PayloadHeader {
        PayloadHeader {
            kind: PayloadKind::Activations(FloatType::F32),
            revision: ReplicaRevision(3),
            step: StepId(step),
            sequence: 0,
        }
    }

    #[test]
    fn a_payload_arrives_bit_for_bit() {
        let (mut out, mut inward) = pair(LinkFaults::default());
        let values = [1.5, -0.0, f32::MIN_POSITIVE, f32::INFINITY];
        out.send(header(1), &values).unwrap();
        let mut received = [0.0; 4];
        inward.receive(header(1), &mut received, &mut || Ok(())).unwrap();
        assert_eq!(values.map(f32::to_bits), received.map(f32::to_bits));
    }

    #[test]
    fn a_payload_of_another_step_or_shape_is_refused() {
        for (step, length) in [(2, 4), (1, 3)] {
            let (mut out, mut inward) = pair(LinkFaults::default());
            out.send(header(step), &vec![0.0; length]).unwrap();
            assert!(inward.receive(header(1), &mut [0.0; 4], &mut || Ok(())).is_err());
        }
    }

    #[test]
    fn narrower_activations_travel_in_half_the_bytes_and_only_to_whom_expects_them() {
        let with = |activations| PayloadHeader { kind: PayloadKind::Activations(activations), ..header(1) };
        // Sixteen values each: the header, then their elements, and nothing more.
        for (kind, length) in
            [(FloatType::F32, 48 + 64), (FloatType::Bf16, 48 + 32), (FloatType::F16, 48 + 32)]
        {
            let (mut out, mut inward) = pair(LinkFaults::default());
            let payload: Vec<u8> = (0..16 * kind.bytes() as u8).collect();
            out.send_bytes(with(kind), &payload).unwrap();
            out.shutdown();
            let mut sent = Vec::new();
            inward.socket.read_to_end(&mut sent).unwrap();
            assert_eq!((sent.len(), &sent[48..]), (length, &payload[..]), "{kind}");
        }
        let (mut out, mut inward) = pair(LinkFaults::default());
        out.send_bytes(with(FloatType::F16), &[1; 32]).unwrap();
        let mut received = [0; 32];
        assert!(inward.receive_bytes(with(FloatType::Bf16), &mut received, &mut || Ok(())).is_err());
    }

    #[test]
    fn rows_of_any_step_are_taken_up_to_the_limit() {
        let head = |step| PayloadHeader { kind: PayloadKind::HeadRows, ..header(step) };
        let receive = |sent: PayloadHeader, length: usize| {
            let (mut out, mut inward) = pair(LinkFaults::default());
            out.send(sent, &vec![1.0; length]).unwrap();
            let mut values = Vec::new();
            let expected = (PayloadKind::HeadRows, ReplicaRevision(3));
            let step = inward.receive_any(expected, (4, 2), &mut values, &mut || Ok(()));
            step.map(|step| (step, values.len()))
        };
        assert_eq!(receive(head(7), 4).unwrap(), ((StepId(7), 0), 4));
        assert_eq!(receive(head(8), 8).unwrap(), ((StepId(8), 0), 8));
        for length in [0, 6, 12] {
            assert!(receive(head(7), length).is_err(), "{length} values");
        }
        assert!(receive(header(7), 4).is_err(), "another kind");
        assert!(receive(PayloadHeader { revision: ReplicaRevision(2), ..head(7) }, 4).is_err());
    }

    #[test]
    fn a_broken_link_is_seen_by_both_sides() {
        let (mut out, mut inward) = pair(LinkFaults { delay_us: 0, break_after: 1 });
        out.send(header(1), &[0.0]).unwrap();
        assert!(out.send(header(2), &[0.0]).is_err());
        inward.receive(header(1), &mut [0.0], &mut || Ok(())).unwrap();
        assert!(inward.receive(header(2), &mut [0.0], &mut || Ok(())).is_err());
    }

    #[test]
    fn a_waiting_receiver_is_told_that_time_passes() {
        let (_out, mut inward) = pair(LinkFaults::default());
        inward.socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let mut calls = 0;
        let result = inward.receive(header(1), &mut [0.0], &mut || {
            calls += 1;
            if calls < 3 { Ok(()) } else { Err(FrameError::Closed) }
        });
        assert!(matches!(result, Err(FrameError::Closed)));
    }
}
