//! One-shot exchanges: every rank writes its contribution into its own slot, raises its stamp, and reads all the others'.
//!
//! Stamps count exchanges. With two slots per rank, one wait per exchange is enough: a rank fills a slot again two exchanges
//! later, and by then it has seen every stamp of the exchange between, which a rank raises only after it has read
//! everything of the one before. [`Exchange::enter`] waits for just that, also where a rank reads nothing (`gather`).

use crate::alarm::{Alarm, ring};
use crate::segment::{BUFFERS, Control, Memory, Segment};
use rustix::thread::futex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A waiting rank calls its attendant at least this often.
pub const ATTEND_INTERVAL: Duration = Duration::from_millis(50);
/// Looks at a stamp between two looks at the clock.
const LOOKS: usize = 64;

/// What a rank does beside the exchange itself. An error ends the exchange, with these words.
pub trait Attendant {
    /// Called before each publication of a contribution.
    fn publishing(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Called at least every [`ATTEND_INTERVAL`] while a rank waits.
    fn waiting(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// Nothing beside the exchange.
impl Attendant for () {}

/// Why an exchange failed; it cannot be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// An [`Alarm`] was raised.
    #[error("{reason}")]
    Lost {
        /// Who is lost.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// The attendant gave up.
    #[error("{reason}")]
    GivenUp {
        /// Who was waited for, or this rank itself.
        rank: usize,
        /// The attendant's words.
        reason: String,
    },
    /// A rank contributes something else than was expected.
    #[error("contribution of another step or length: lay the replica out anew")]
    Mismatch {
        /// Which rank.
        rank: usize,
    },
    /// The caller's buffers do not fit together.
    #[error("{values} values do not fit buffers of {room}: every rank must pass the lengths of all")]
    Shape {
        /// This rank.
        rank: usize,
        /// Values to move.
        values: usize,
        /// Room for them.
        room: usize,
    },
    /// An earlier exchange failed.
    #[error("an earlier exchange failed: lay the replica out anew")]
    Broken {
        /// This rank.
        rank: usize,
    },
}

impl ExchangeError {
    /// The rank it is about.
    pub fn rank(&self) -> usize {
        match *self {
            ExchangeError::Lost { rank, .. }
            | ExchangeError::GivenUp { rank, .. }
            | ExchangeError::Mismatch { rank }
            | ExchangeError::Shape { rank, .. }
            | ExchangeError::Broken { rank } => rank,
        }
    }
}

/// One rank's end of the shared memory.
#[derive(Debug)]
pub struct Exchange {
    segment: Arc<Segment>,
    rank: usize,
    /// Exchanges entered, the value of this rank's stamp. Wraps.
    entered: u32,
    alarm: Alarm,
    spin: Duration,
    broken: bool,
}

impl Exchange {
    /// Over memory that all ranks share. `spin` bounds how long a wait spins before it sleeps.
    pub fn new(memory: Memory, spin: Duration) -> Exchange {
        let Memory { segment, rank } = memory;
        let segment = Arc::new(segment);
        Exchange { alarm: Alarm::new(segment.clone(), rank), segment, rank, entered: 0, spin, broken: false }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.segment.geometry().ranks()
    }

    /// Length of the shared memory in bytes.
    pub fn bytes(&self) -> usize {
        self.segment.geometry().bytes()
    }

    /// A handle that ends this rank's waits.
    pub fn alarm(&self) -> Alarm {
        self.alarm.clone()
    }

    /// Every rank contributes `own`, all of one length; `all` receives the contributions in rank order. All ranks must
    /// pass the same `label`.
    pub fn all_gather(
        &mut self,
        label: u64,
        own: &[f32],
        all: &mut [f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        self.guarded(|exchange| exchange.try_all_gather(label, own, all, attendant))
    }

    /// Rank *r* contributes `lengths[r]` values; on rank 0 `all` receives them in rank order, elsewhere it is untouched.
    pub fn gather(
        &mut self,
        label: u64,
        own: &[f32],
        lengths: &[usize],
        all: &mut [f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        self.guarded(|exchange| exchange.try_gather(label, own, lengths, all, attendant))
    }

    /// After a failure the ranks no longer agree on what was exchanged.
    fn guarded(
        &mut self,
        exchange: impl FnOnce(&mut Exchange) -> Result<(), ExchangeError>,
    ) -> Result<(), ExchangeError> {
        if self.broken {
            return Err(ExchangeError::Broken { rank: self.rank });
        }
        let done = exchange(self);
        self.broken = done.is_err();
        done
    }

    fn shape(&self, values: usize, room: usize) -> ExchangeError {
        ExchangeError::Shape { rank: self.rank, values, room }
    }

    fn try_all_gather(
        &mut self,
        label: u64,
        own: &[f32],
        all: &mut [f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        let (size, length, slot) = (self.size(), own.len(), self.segment.geometry().slot_values());
        let values = length.saturating_mul(size);
        if all.len() < values {
            return Err(self.shape(values, all.len()));
        }
        for (index, piece) in own.chunks(slot).enumerate() {
            self.enter(label, piece, attendant)?;
            let at = |rank: usize| rank * length + index * slot..rank * length + index * slot + piece.len();
            all[at(self.rank)].copy_from_slice(piece);
            // Each rank begins with its neighbour, so that they do not all read the same slot at once.
            for peer in (1..size).map(|offset| (self.rank + offset) % size) {
                self.read(peer, label, &mut all[at(peer)], attendant)?;
            }
        }
        Ok(())
    }

    fn try_gather(
        &mut self,
        label: u64,
        own: &[f32],
        lengths: &[usize],
        all: &mut [f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        let (size, slot) = (self.size(), self.segment.geometry().slot_values());
        if lengths.len() != size || lengths[self.rank] != own.len() {
            return Err(self.shape(own.len(), lengths.get(self.rank).copied().unwrap_or_default()));
        }
        let values = lengths.iter().fold(0usize, |sum, length| sum.saturating_add(*length));
        if self.rank == 0 && all.len() < values {
            return Err(self.shape(values, all.len()));
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        for from in (0..longest).step_by(slot) {
            // Whoever has less contributes an empty piece, so that everybody counts the same exchanges.
            let piece = |length: usize| from.min(length)..(from + slot).min(length);
            self.enter(label, &own[piece(own.len())], attendant)?;
            if self.rank > 0 {
                continue;
            }
            let mut start = 0;
            for (peer, &length) in lengths.iter().enumerate() {
                let piece = piece(length);
                let target = &mut all[start + piece.start..start + piece.end];
                match peer {
                    0 => target.copy_from_slice(&own[piece]),
                    _ => self.read(peer, label, target, attendant)?,
                }
                start += length;
            }
        }
        Ok(())
    }

    /// Contributes `piece`, at most a slot, to the next exchange.
    fn enter(
        &mut self,
        label: u64,
        piece: &[f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        if let Some((rank, reason)) = self.alarm.lost() {
            return Err(ExchangeError::Lost { rank, reason });
        }
        // Whoever has entered the last exchange has read all it wanted of the one before, whose slot is filled now.
        for peer in (0..self.size()).filter(|&peer| peer != self.rank) {
            self.wait_for(peer, attendant)?;
        }
        let exchange = self.entered.wrapping_add(1);
        let buffer = exchange as usize % BUFFERS;
        self.segment.write(self.rank, buffer, piece);
        let own = self.segment.control(self.rank);
        own.contents[buffer].label.store(label, Ordering::Relaxed);
        own.contents[buffer].length.store(piece.len() as u64, Ordering::Relaxed);
        attendant.publishing().map_err(|reason| ExchangeError::GivenUp { rank: self.rank, reason })?;
        // Releases the contribution: who acquires this stamp sees the values. Sequentially consistent beyond that, because
        // the sleepers are looked at next: either they are seen here, or they see the stamp (see `sleep`).
        own.stamp.store(exchange, Ordering::SeqCst);
        self.entered = exchange;
        for peer in (0..self.size()).filter(|&peer| peer != self.rank) {
            if self.segment.control(peer).sleep.asleep.load(Ordering::SeqCst) != 0 {
                ring(&self.segment, peer);
            }
        }
        Ok(())
    }

    /// Takes a peer's contribution to the exchange that this rank has entered.
    fn read(
        &self,
        peer: usize,
        label: u64,
        values: &mut [f32],
        attendant: &mut dyn Attendant,
    ) -> Result<(), ExchangeError> {
        self.wait_for(peer, attendant)?;
        let buffer = self.entered as usize % BUFFERS;
        let contents = &self.segment.control(peer).contents[buffer];
        let (found, length) =
            (contents.label.load(Ordering::Relaxed), contents.length.load(Ordering::Relaxed));
        if found != label || length != values.len() as u64 {
            return Err(ExchangeError::Mismatch { rank: peer });
        }
        self.segment.read(peer, buffer, values);
        Ok(())
    }

    /// Waits until `peer` has entered the exchange that this rank has entered last: spins for a bounded time, then sleeps.
    fn wait_for(&self, peer: usize, attendant: &mut dyn Attendant) -> Result<(), ExchangeError> {
        let control = self.segment.control(peer);
        if self.reached(control) {
            return Ok(());
        }
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.reached(control) {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            // Before the alarm: what a peer has contributed counts, even if it has left since.
            if let Some((rank, reason)) = self.alarm.lost() {
                return Err(ExchangeError::Lost { rank, reason });
            }
            if started.elapsed() >= self.spin {
                break;
            }
            // The peer may be waiting for this very core: without this, spinning would be what it waits for.
            std::thread::yield_now();
        }
        while !self.sleep(control) {
            if let Some((rank, reason)) = self.alarm.lost() {
                return Err(ExchangeError::Lost { rank, reason });
            }
            attendant.waiting().map_err(|reason| ExchangeError::GivenUp { rank: peer, reason })?;
        }
        Ok(())
    }

    /// The acquiring load pairs with the stamp's release: the peer's values, and that it has done with older ones.
    fn reached(&self, control: &Control) -> bool {
        let ahead = control.stamp.load(Ordering::SeqCst).wrapping_sub(self.entered);
        ahead.cast_signed() >= 0
    }

    /// Sleeps until the bell rings, at most [`ATTEND_INTERVAL`]; whether the peer has arrived.
    ///
    /// No ring is lost. This rank says that it sleeps, reads the bell, then looks at the stamp; a peer raises its stamp,
    /// then looks who sleeps. In the one order of all these operations, either the peer's look comes later and it rings,
    /// so that the bell is no longer what was read here and the kernel does not let us sleep; or it comes earlier, and
    /// then so does its stamp, which is seen here. The alarm rings always, after it was raised.
    fn sleep(&self, control: &Control) -> bool {
        let own = &self.segment.control(self.rank).sleep;
        own.asleep.store(1, Ordering::SeqCst);
        let bell = own.bell.load(Ordering::SeqCst);
        if !self.reached(control) && self.alarm.lost().is_none() {
            let limit = futex::Timespec { tv_sec: 0, tv_nsec: ATTEND_INTERVAL.subsec_nanos().into() };
            // However it ends (a ring, the limit, a signal), the caller looks again.
            let _ = futex::wait(&own.bell, futex::Flags::empty(), bell, Some(&limit));
        }
        own.asleep.store(0, Ordering::SeqCst);
        self.reached(control)
    }
}
