//! What the audits' core is told, and what it wants done. Both are closed enums.

use ashlar_protocol::serving::Submit;
use ashlar_protocol::step::{Boundary, RowDigests};
use ashlar_vocabulary::{ReplicaId, ReplicaRevision, SequenceId, TokenId};
use std::fmt;

/// Names one audit; never reused within a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuditId(pub u64);

impl fmt::Display for AuditId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an audited sequence came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Transcript {
    /// The replica that computed the end of it.
    pub replica: ReplicaId,
    /// What was asked for.
    pub submit: Box<Submit>,
    /// Its tokens after the prompt.
    pub generated: Vec<TokenId>,
}

/// What the core is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A sequence is about to be computed whose rows' digests will come.
    Begun {
        /// Which.
        sequence: SequenceId,
        /// The audit that it repeats another one for; without one it is a client's.
        repeats: Option<AuditId>,
    },
    /// A stage has computed rows of audited sequences.
    Digests {
        /// The replica.
        replica: ReplicaId,
        /// Its layout.
        revision: ReplicaRevision,
        /// Of their rows.
        digests: Vec<RowDigests>,
    },
    /// An audited sequence has ended.
    Ended {
        /// Which.
        sequence: SequenceId,
        /// What it came to, unless it was cancelled, failed, or was lost with its replica.
        transcript: Option<Transcript>,
    },
    /// A sequence that was to repeat another one was refused.
    Refused {
        /// For which audit.
        audit: AuditId,
    },
    /// A replica serves.
    ReplicaUp {
        /// Which.
        replica: ReplicaId,
    },
    /// A replica does not serve any more: what it computed can neither be repeated nor blamed on its layout.
    ReplicaDown {
        /// Which.
        replica: ReplicaId,
    },
}

/// What it wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Compute a sequence again, every position of it, on this replica.
    Repeat {
        /// For which audit.
        audit: AuditId,
        /// Where.
        replica: ReplicaId,
        /// All that was known of it as the prompt.
        submit: Box<Submit>,
        /// From where on the head was used.
        logits_from: u32,
    },
    /// A stage computes other bits than it should.
    Found(Finding),
}

/// Where the bits of two computations part, and whose are wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The first boundary at which they differ.
    pub boundary: Boundary,
    /// So many layers before it they are still the same.
    pub same_until_layer: u32,
    /// The first position that differs there.
    pub position: u32,
    /// The replica that was wrong, by its layout then; `None` if nobody can tell.
    pub wrong: Option<(ReplicaId, ReplicaRevision)>,
    /// The replicas that were compared.
    pub compared: Vec<ReplicaId>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { boundary, same_until_layer, position, wrong, compared } = self;
        write!(f, "{boundary} differ at position {position}, those after layer {same_until_layer} do not: ")?;
        match wrong {
            Some((replica, _)) => write!(f, "replica {replica} is wrong"),
            None => {
                let of: Vec<String> = compared.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "replicas {} each compute the same again, and nobody else can tell",
                    of.join(" and ")
                )
            }
        }
    }
}
