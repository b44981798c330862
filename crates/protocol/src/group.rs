//! Rank to rank, before the first step: how a tensor-parallel group will exchange.
//!
//! Rank 0 proposes, every other rank answers, rank 0 decides for all; these messages travel on the group's connections to
//! rank 0, which carry nothing else before. So no rank uses memory while another uses sockets: a rank that has not heard
//! the decision has not begun.

use serde::{Deserialize, Serialize};
use std::fmt;

/// From rank 0 to every other rank, once all are connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupOffer {
    /// The group exchanges over its connections; final, needs no answer.
    Sockets {
        /// Why, for logs.
        reason: String,
    },
    /// The group exchanges through memory if every rank can get it.
    SharedMemory {
        /// Abstract name of the Unix socket that hands it out.
        socket: String,
        /// What this rank must show there.
        token: HandoverToken,
    },
}

/// From every other rank to rank 0, where it has offered memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupAnswer {
    /// It has the memory.
    Attached,
    /// It has not: the group uses its connections.
    Declined {
        /// Why, for logs.
        reason: String,
    },
}

/// From rank 0 to every other rank, when all have answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupDecision {
    /// Every rank has the memory.
    SharedMemory,
    /// Some rank has not.
    Sockets {
        /// Why, for logs.
        reason: String,
    },
}

/// A secret between rank 0 and one other rank.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverToken(pub [u8; 16]);

impl fmt::Debug for HandoverToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandoverToken(secret)")
    }
}
