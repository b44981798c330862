//! Rows on their way from stage to stage: in the type that the model's owner chose.
//!
//! The model has rounded them to it, wherever stages are cut, so they travel without loss.

use crate::links::Sender;
use ashlar_kernels::Kernels;
use ashlar_protocol::data::{DataLink, PayloadHeader, PayloadKind};
use ashlar_protocol::frame::FrameError;
use ashlar_vocabulary::{FloatType, ReplicaRevision, StepId};

/// How the rows of a layout travel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowFormat {
    /// The layout.
    pub(crate) revision: ReplicaRevision,
    /// Type of the elements.
    pub(crate) kind: FloatType,
}

impl RowFormat {
    fn header(self, step: StepId) -> PayloadHeader {
        let kind = PayloadKind::Activations(self.kind);
        PayloadHeader { kind, revision: self.revision, step, sequence: 0 }
    }
}

/// To the next stage.
#[derive(Debug)]
pub struct ActivationSender {
    sender: Sender,
    format: RowFormat,
}

impl ActivationSender {
    pub(crate) fn start(link: DataLink, format: RowFormat) -> ActivationSender {
        ActivationSender { sender: Sender::start(link), format }
    }

    /// Bytes that so many values take on their way.
    pub fn bytes_of(&self, values: usize) -> u64 {
        (values * self.format.kind.bytes()) as u64
    }

    /// Queues the rows of `step`; waits while the queue is full. Fails once the link is broken.
    pub fn send(&self, kernels: &Kernels, step: StepId, rows: &[f32]) -> Result<(), FrameError> {
        let header = self.format.header(step);
        let kind = self.format.kind;
        match kind {
            FloatType::F32 => self.sender.send(header, rows),
            FloatType::Bf16 | FloatType::F16 => {
                self.sender.send_with(header, rows.len() * kind.bytes(), |payload| {
                    kernels.narrow(kind, rows, payload)
                })
            }
        }
    }
}

/// From the previous stage.
#[derive(Debug)]
pub struct ActivationReceiver {
    link: DataLink,
    format: RowFormat,
    /// Narrow rows as they arrive.
    payload: Vec<u8>,
}

impl ActivationReceiver {
    pub(crate) fn new(link: DataLink, format: RowFormat) -> ActivationReceiver {
        ActivationReceiver { link, format, payload: Vec::new() }
    }

    /// Waits for the rows of `step` and puts them into `rows`. `idle` is called as [`DataLink::receive`] calls it.
    pub fn receive(
        &mut self,
        kernels: &Kernels,
        step: StepId,
        rows: &mut [f32],
        idle: &mut dyn FnMut() -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        let header = self.format.header(step);
        let kind = self.format.kind;
        if kind == FloatType::F32 {
            return self.link.receive(header, rows, idle);
        }
        self.payload.resize(rows.len() * kind.bytes(), 0);
        self.link.receive_bytes(header, &mut self.payload, idle)?;
        kernels.widen(kind, &self.payload, rows);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_kernels::Isa;
    use ashlar_protocol::data::LinkFaults;
    use std::net::{TcpListener, TcpStream};

    fn pair(sent: FloatType, expected: FloatType) -> (ActivationSender, ActivationReceiver) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (inward, _) = listener.accept().unwrap();
        let link = |socket| DataLink::new(socket, LinkFaults::default()).unwrap();
        let format = |kind| RowFormat { revision: ReplicaRevision(2), kind };
        (
            ActivationSender::start(link(out), format(sent)),
            ActivationReceiver::new(link(inward), format(expected)),
        )
    }

    #[test]
    fn rounded_rows_arrive_bit_for_bit() {
        let kernels = Kernels::new(Isa::best(), 2);
        for kind in FloatType::ALL {
            let (sender, mut receiver) = pair(kind, kind);
            // The second step is the shorter one: buffers are used again.
            for (step, length) in [(StepId(1), 40_000), (StepId(2), 64)] {
                let mut rows: Vec<f32> = (0..length).map(|i| (i as f32 * 0.37).sin() * 100.0).collect();
                kernels.round_to(kind, &mut rows);
                sender.send(&kernels, step, &rows).unwrap();
                let mut arrived = vec![f32::NAN; length];
                receiver.receive(&kernels, step, &mut arrived, &mut || Ok(())).unwrap();
                assert!(rows.iter().zip(&arrived).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind}");
            }
        }
    }

    #[test]
    fn rows_of_another_type_are_refused() {
        let kernels = Kernels::new(Isa::best(), 1);
        let (sender, mut receiver) = pair(FloatType::F16, FloatType::Bf16);
        sender.send(&kernels, StepId(1), &[1.0; 8]).unwrap();
        assert!(receiver.receive(&kernels, StepId(1), &mut [0.0; 8], &mut || Ok(())).is_err());
    }
}
