//! A head that is spread over all stages: the rank that samples hands out rows, every rank of an earlier stage answers with
//! its slice of their logits.
//!
//! The rows of one chunk are handed out once, and no more before all slices are in, so at most one chunk is on its way.
//! A rank answers between two layers of whatever it computes, and while it waits: no collective is part of it, and an
//! answer needs nothing but the rows. The rank that samples therefore waits only for ranks of earlier stages, which wait only
//! for stages before themselves, and the first one for nobody: there is no circle.
//!
//! Rows travel over a connection. So do slices, unless both ranks are on one host: then they are left in memory that the two
//! share, and only their announcement travels.

use crate::beat::Beat;
use crate::links::Sender;
use ashlar_identity::Socket;
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_model::{HeadError, HeadRanks, LogitColumns, StageModel};
use ashlar_protocol::data::{DataLink, LinkFaults, PayloadHeader, PayloadKind};
use ashlar_protocol::frame::FrameError;
use ashlar_shared_memory::{Mailbox, MailboxError, Memory};
use ashlar_vocabulary::{Bytes, ReplicaRevision, StepId};
use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tracing::warn;

/// Chunks of rows waiting for the compute thread: an honest rank that samples never has more than one.
const ASKED_QUEUE: usize = 2;

/// Called, on a thread of the link's own, when rows have arrived: wakes the compute thread if it waits for work.
#[derive(Clone)]
pub struct Wake(Arc<dyn Fn() + Send + Sync>);

impl Wake {
    /// Wakes the compute thread by calling `how`.
    pub fn new(how: impl Fn() + Send + Sync + 'static) -> Wake {
        Wake(Arc::new(how))
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

/// Values of what travels for a slice of the head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SliceValues {
    /// Of one row: the hidden size.
    pub(crate) row: usize,
    /// Of the slice of its logits.
    pub(crate) slice: usize,
}

/// How a slice of the logits travels, in words for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadTransport {
    /// Through memory that both ranks share.
    SharedMemory,
    /// Over their connection.
    Socket {
        /// Why not through memory.
        reason: String,
    },
}

impl fmt::Display for HeadTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeadTransport::SharedMemory => f.write_str("through shared memory"),
            HeadTransport::Socket { reason } => write!(f, "over a socket: {reason}"),
        }
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
    answers: Answers,
    values: SliceValues,
    slice: Vec<f32>,
    spent: Duration,
    socket: Socket,
}

/// How slices go back.
#[derive(Debug)]
enum Answers {
    /// Left in memory, and announced on the connection.
    Memory(Mailbox, DataLink),
    /// On a thread of its own: the rank that samples reads them while it computes, or later.
    Socket(Sender),
}

impl HeadService {
    /// Reads rows on a thread of its own, until the link ends. How it ended is no matter here: the rank that samples sees it,
    /// too, and its failure is everybody's.
    pub(crate) fn start(
        socket: Socket,
        memory: Option<Memory>,
        revision: ReplicaRevision,
        faults: LinkFaults,
        (values, wake): (SliceValues, Wake),
    ) -> std::io::Result<HeadService> {
        let (queue, asked) = mpsc::sync_channel(ASKED_QUEUE);
        let (spare, spares) = mpsc::sync_channel(ASKED_QUEUE);
        for _ in 0..ASKED_QUEUE {
            // There is room for just these.
            let _ = spare.try_send(Vec::with_capacity(LOGIT_ROWS_MAX * values.row));
        }
        let back = DataLink::new(socket.try_clone()?, faults)?;
        let answers = match memory {
            Some(memory) => Answers::Memory(Mailbox::new(memory), back),
            None => Answers::Socket(Sender::start(back)),
        };
        let link = DataLink::new(socket.try_clone()?, faults)?;
        std::thread::Builder::new()
            .name("head-rows".into())
            .spawn(move || read_rows(link, revision, (values.row, wake), &queue, &spares))?;
        let slice = Vec::with_capacity(LOGIT_ROWS_MAX * values.slice);
        Ok(HeadService { revision, asked, spare, answers, values, slice, spent: Duration::ZERO, socket })
    }

    /// Memory that it reserves: rows arriving and in work, a slice computed, and where slices travel over a socket another on
    /// its way. Memory that is shared is counted on the rank that samples, which has made it.
    pub fn bytes(&self) -> Bytes {
        let slices = match self.answers {
            Answers::Memory(..) => 1,
            Answers::Socket(_) => 2,
        };
        Bytes(4 * (LOGIT_ROWS_MAX * (ASKED_QUEUE * self.values.row + slices * self.values.slice)) as u64)
    }

    /// Answers what has been asked so far; returns at once where nothing has.
    pub fn serve(&mut self, model: &StageModel) -> Result<(), FrameError> {
        while let Ok(Asked { step, sequence, rows }) = self.asked.try_recv() {
            let started = Instant::now();
            let count = rows.len() / model.config().shape.hidden_size;
            self.slice.resize(count * model.head_width(), 0.0);
            model.head_slice(&rows, &mut self.slice);
            let header = PayloadHeader { kind: PayloadKind::Logits, revision: self.revision, step, sequence };
            match &mut self.answers {
                Answers::Memory(mailbox, link) => {
                    mailbox.post(label(header), &self.slice, model.head_width()).map_err(unusable)?;
                    // No more than a header, and the last one has been read: this cannot block.
                    link.send(header, &[])?;
                }
                Answers::Socket(sender) => sender.send(header, &self.slice)?,
            }
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
        let _ = self.socket.shutdown();
    }
}

fn read_rows(
    mut link: DataLink,
    revision: ReplicaRevision,
    (row_values, wake): (usize, Wake),
    queue: &mpsc::SyncSender<Asked>,
    spares: &mpsc::Receiver<Vec<f32>>,
) {
    loop {
        let mut rows = spares.try_recv().unwrap_or_default();
        let limits = (row_values, LOGIT_ROWS_MAX);
        match link.receive_any((PayloadKind::HeadRows, revision), limits, &mut rows, &mut || Ok(())) {
            Ok((step, sequence)) => {
                if queue.send(Asked { step, sequence, rows }).is_err() {
                    return;
                }
                (wake.0)();
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

/// Names a chunk of rows in a mailbox: steps of one layout, and few chunks in each.
fn label(header: PayloadHeader) -> u64 {
    header.step.0 << 20 ^ u64::from(header.sequence)
}

fn unusable(error: MailboxError) -> FrameError {
    FrameError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error))
}

/// Rank 0 of the last stage: its links to the ranks of earlier stages, in the order of their slices. None where the head is
/// not spread.
#[derive(Debug)]
pub struct HeadLinks {
    revision: ReplicaRevision,
    links: Vec<HeadLink>,
    /// A slice that arrives over a connection.
    arriving: Vec<f32>,
    beat: Beat,
    step: StepId,
    /// Counts chunks of rows within the step.
    sequence: u32,
    spent: Duration,
}

/// One rank of an earlier stage.
#[derive(Debug)]
pub(crate) struct HeadLink {
    pub(crate) link: DataLink,
    /// Where its slices are left, or why they travel over the connection.
    pub(crate) mailbox: Result<Mailbox, String>,
    /// Values of its slice of a row.
    pub(crate) slice_values: usize,
}

impl HeadLinks {
    pub(crate) fn new(revision: ReplicaRevision, links: Vec<HeadLink>, beat: Beat) -> HeadLinks {
        let over_sockets = links.iter().filter(|link| link.mailbox.is_err()).map(|link| link.slice_values);
        let arriving = vec![0.0; LOGIT_ROWS_MAX * over_sockets.max().unwrap_or(0)];
        HeadLinks { revision, links, arriving, beat, step: StepId(0), sequence: 0, spent: Duration::ZERO }
    }

    /// Memory that it reserves: what it shares with other ranks, and where a slice that travels over a socket arrives.
    pub fn bytes(&self) -> Bytes {
        let shared = self.links.iter().filter_map(|link| link.mailbox.as_ref().ok()).map(Mailbox::bytes);
        Bytes((shared.sum::<usize>() + 4 * self.arriving.len()) as u64)
    }

    /// How each slice of an earlier stage travels, in their order.
    pub fn transports(&self) -> impl Iterator<Item = HeadTransport> {
        self.links.iter().map(|link| match &link.mailbox {
            Ok(_) => HeadTransport::SharedMemory,
            Err(reason) => HeadTransport::Socket { reason: reason.clone() },
        })
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

    fn receive(&mut self, index: usize, mut slice: LogitColumns<'_>) -> Result<(), FrameError> {
        let header = self.header(PayloadKind::Logits);
        let beat = &self.beat;
        let HeadLink { link, mailbox, .. } = self.links.get_mut(index).ok_or(FrameError::Closed)?;
        let (rows, width) = (slice.rows(), slice.width());
        match mailbox {
            Ok(mailbox) => {
                link.receive(header, &mut [], &mut || beat.tick())?;
                let post = mailbox.take(label(header), rows, width).map_err(unusable)?;
                slice.iter_mut().enumerate().for_each(|(index, row)| post.read(index, row));
            }
            Err(_) => {
                let arriving = self.arriving.get_mut(..rows * width).ok_or(FrameError::Corrupt)?;
                link.receive(header, arriving, &mut || beat.tick())?;
                slice.copy_from(arriving);
            }
        }
        Ok(())
    }
}

impl HeadRanks for HeadLinks {
    fn hand_out(&mut self, rows: &[f32]) -> Result<(), HeadError> {
        let started = Instant::now();
        self.sequence += 1;
        let header = self.header(PayloadKind::HeadRows);
        for (index, HeadLink { link, .. }) in self.links.iter_mut().enumerate() {
            link.send(header, rows).map_err(|error| lost(index, &error))?;
        }
        self.spent += started.elapsed();
        Ok(())
    }

    fn collect(&mut self, index: usize, slice: LogitColumns<'_>) -> Result<(), HeadError> {
        let started = Instant::now();
        self.receive(index, slice).map_err(|error| lost(index, &error))?;
        self.spent += started.elapsed();
        Ok(())
    }
}

fn lost(index: usize, error: &FrameError) -> HeadError {
    HeadError { index, reason: error.to_string() }
}
