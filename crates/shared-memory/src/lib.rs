//! Exchange between ranks of one replica through memory that they share, on one host.
//!
//! * [`segment`]: the memory itself, mapped; the only unsafe code.
//! * [`exchange`]: one-shot, double-buffered gathers over it, for a tensor-parallel group.
//! * [`mailbox`]: rows from one rank to one other, announced over their connection.
//! * [`alarm`]: ends a wait from another thread, at once.
//! * [`handover`]: how the memory reaches the other ranks, and nobody else.
//!
//! In an exchange every rank has two slots of a fixed number of values. In exchange *n* it copies its contribution into slot *n mod 2*,
//! raises its stamp to *n*, and reads the others' slots once their stamps have reached *n*. Contributions are only moved:
//! what is computed from them, and in which order, is the caller's.
//!
//! **Invariants:** whatever a peer writes into the memory, reading it is defined: all of it is atomics, and the memory is
//! sealed, so that it cannot shrink under a reader. A wait spins for a bounded time, then sleeps, and calls its attendant at
//! least every [`exchange::ATTEND_INTERVAL`]. No knowledge of models, layouts or the wire between hosts.

pub mod alarm;
pub mod exchange;
pub mod handover;
pub mod mailbox;
pub mod segment;

pub use alarm::Alarm;
pub use exchange::{Attendant, Exchange, ExchangeError};
pub use handover::{HandoverError, Offer, Token, attach};
pub use mailbox::{Mailbox, MailboxError};
pub use segment::{Geometry, GeometryError, Memory};

/// Most ranks that share one memory: beyond this a one-shot exchange reads more than it saves.
pub const RANKS_MAX: usize = 8;
/// Values of one slot: two slots of two ranks stay within an L2 cache, and longer contributions go chunk by chunk.
pub const SLOT_VALUES: usize = 32 << 10;
