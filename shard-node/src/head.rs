//! A head that is spread over all stages: the rank that samples hands out rows, every rank of an earlier stage answers with
//! its slice of their logits.
//!
//! The rows of one chunk are handed out once, and no more before all slices are in, so at most one chunk is on its way.
//! A rank answers between two layers of whatever it computes, and while it waits: no collective is part of it, and an
//! answer needs nothing but the rows. The rank that samples therefore waits only for ranks of earlier stages, which wait only
//! for stages before themselves, and the first one for nobody: there is no circle.

use crate::beat::Beat;
use crate::links::Sender;
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_model::{HeadError, HeadRanks, StageModel};
use ashlar_protocol::data::{DataLink, LinkFaults, PayloadHeader, PayloadKind};
use ashlar_protocol::frame::FrameError;
use ashlar_vocabulary::{ReplicaRevision, StepId};
use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tracing::warn;

/// Chunks of rows waiting for the compute thread: an honest rank that samples never has more than one.
const ASKED_QUEUE: usize = 2;

/// How a rank's part in a spread head is set up.
#[derive(Clone)]
pub struct HeadSetup {
    /// Values of one row: the hidden size.
    pub row_values: usize,
    /// Called, on a thread of the link's own, when rows have arrived: wakes the compute thread if it waits for work.
    pub wake: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for HeadSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadSetup").field("row_values", &self.row_values).finish_non_exhaustive()
    }
}

/// Rows whose logits the sampling rank wants from this one.
#[derive(Debug)]
struct Asked {
    step: StepId,
    sequence: u32,
    rows: Vec<f32>,
}

/// A rank of an earlier stage: computes its slice whenever it is asked to.
#[derive(Debug)]
pub struct HeadService {
    revision: ReplicaRevision,
    asked: mpsc::Receiver<Asked>,
    /// Buffers on their way back to the thread that fills them.
    spare: mpsc::SyncSender<Vec<f32>>,
    answers: Sender,
    slice: Vec<f32>,
    spent: Duration,
    socket: TcpStream,
}

impl HeadService {
    /// Reads rows on a thread of its own, until the link ends. How it ended is no matter here: the rank that samples sees it,
    /// too, and its failure is everybody's.
    pub(crate) fn start(
        socket: TcpStream,
        revision: ReplicaRevision,
        faults: LinkFaults,
        setup: HeadSetup,
    ) -> std::io::Result<HeadService> {
        let (queue, asked) = mpsc::sync_channel(ASKED_QUEUE);
        let (spare, spares) = mpsc::sync_channel(ASKED_QUEUE);
        let answers = Sender::start(DataLink::new(socket.try_clone()?, faults)?);
        let link = DataLink::new(socket.try_clone()?, faults)?;
        std::thread::Builder::new()
            .name("head-rows".into())
            .spawn(move || read_rows(link, revision, &setup, &queue, &spares))?;
        Ok(HeadService { revision, asked, spare, answers, slice: Vec::new(), spent: Duration::ZERO, socket })
    }

    /// Answers what has been asked so far; returns at once where nothing has.
    pub fn serve(&mut self, model: &StageModel) -> Result<(), FrameError> {
        while let Ok(Asked { step, sequence, rows }) = self.asked.try_recv() {
            let started = Instant::now();
            let count = rows.len() / model.config().shape.hidden_size;
            self.slice.resize(count * model.head_width(), 0.0);
            model.head_slice(&rows, &mut self.slice);
            let header = PayloadHeader { kind: PayloadKind::Logits, revision: self.revision, step, sequence };
            self.answers.send(header, &self.slice)?;
            // A full return queue only means that this buffer is freed.
            let _ = self.spare.try_send(rows);
            self.spent += started.elapsed();
        }
        Ok(())
    }

    /// Time spent answering since the last call.
    pub fn take_spent(&mut self) -> Duration {
        std::mem::take(&mut self.spent)
    }
}

impl Drop for HeadService {
    /// Ends the reading thread, which has a handle of its own.
    fn drop(&mut self) {
        // A link that is closed already is as broken as it can be.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn read_rows(
    mut link: DataLink,
    revision: ReplicaRevision,
    setup: &HeadSetup,
    queue: &mpsc::SyncSender<Asked>,
    spares: &mpsc::Receiver<Vec<f32>>,
) {
    loop {
        let mut rows = spares.try_recv().unwrap_or_default();
        let limits = (setup.row_values, LOGIT_ROWS_MAX);
        match link.receive_any((PayloadKind::HeadRows, revision), limits, &mut rows, &mut || Ok(())) {
            Ok((step, sequence)) => {
                if queue.send(Asked { step, sequence, rows }).is_err() {
                    return;
                }
                (setup.wake)();
            }
            Err(error) => {
                if !matches!(error, FrameError::Closed) {
                    warn!("the rank that samples was lost: {error}");
                }
                // So that it hears of it, whatever the reason.
                link.shutdown();
                return;
            }
        }
    }
}

/// Rank 0 of the last stage: its links to the ranks of earlier stages, in the order of their slices. None where the head is
/// not spread.
#[derive(Debug)]
pub struct HeadLinks {
    revision: ReplicaRevision,
    links: Vec<DataLink>,
    beat: Beat,
    step: StepId,
    /// Counts chunks of rows within the step.
    sequence: u32,
    spent: Duration,
}

impl HeadLinks {
    pub(crate) fn new(revision: ReplicaRevision, links: Vec<DataLink>, beat: Beat) -> HeadLinks {
        HeadLinks { revision, links, beat, step: StepId(0), sequence: 0, spent: Duration::ZERO }
    }

    /// Starts counting chunks for `step`.
    pub fn begin(&mut self, step: StepId) {
        (self.step, self.sequence, self.spent) = (step, 0, Duration::ZERO);
    }

    /// Time spent sending rows and waiting for slices since [`HeadLinks::begin`].
    pub fn spent(&self) -> Duration {
        self.spent
    }

    fn header(&self, kind: PayloadKind) -> PayloadHeader {
        PayloadHeader { kind, revision: self.revision, step: self.step, sequence: self.sequence }
    }
}

impl HeadRanks for HeadLinks {
    fn hand_out(&mut self, rows: &[f32]) -> Result<(), HeadError> {
        let started = Instant::now();
        self.sequence += 1;
        let header = self.header(PayloadKind::HeadRows);
        for (index, link) in self.links.iter_mut().enumerate() {
            link.send(header, rows).map_err(|error| lost(index, &error))?;
        }
        self.spent += started.elapsed();
        Ok(())
    }

    fn collect(&mut self, index: usize, slice: &mut [f32]) -> Result<(), HeadError> {
        let started = Instant::now();
        let header = self.header(PayloadKind::Logits);
        let beat = &self.beat;
        let link = self.links.get_mut(index).ok_or_else(|| lost(index, &FrameError::Closed))?;
        link.receive(header, slice, &mut || beat.tick()).map_err(|error| lost(index, &error))?;
        self.spent += started.elapsed();
        Ok(())
    }
}

fn lost(index: usize, error: &FrameError) -> HeadError {
    HeadError { index, reason: error.to_string() }
}
