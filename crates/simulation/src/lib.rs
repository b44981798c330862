//! The pure cores of all roles in one seeded world: the scheduler's director, the nodes' sequencer, the gateways'
//! transcripts, under virtual time.
//!
//! Layout: [`run`] (one seed), `scenario` (what a seed stands for), `world` (time, network, faults), `scheduler`, `node`,
//! `gateway` (the processes around the cores), `process` (what they have in common), `oracle` (the model), `observed` (what is
//! told of a run, [`observe`]), `random`.
//!
//! [`plan`](mod@plan) runs the same processes in a world that somebody has in mind: for questions of capacity, not for faults in the code.
//!
//! Worlds with fine-tuning jobs ([`run_with_jobs`]) have beside that: `tuning` (the jobs, and what has to come of them), `owner`
//! (who asks for them), `weights` (the arithmetic), `session` and `shelf` (a rank's part in training, and its adapters),
//! `durable` (the store and the blobs), `archive` (the scheduler's shell towards them), `watch` and `aftermath` (what must hold
//! of jobs, from event to event and in the end).
//!
//! A seed decides the layout, the clients, the delays, and which processes are killed or stopped, which connections break
//! or swallow everything, which messages come twice, in another order, or not at all. Whatever happens:
//!
//! * every token that a client receives is the model's, in order, none lost, none twice;
//! * where the head is on every stage, the rank that samples gets every slice of the logits of just its rows;
//! * every position that a rank computes finds exactly its own sequence's KV cache before it;
//! * blocks are conserved, after every single event;
//! * every request ends, and once the faults are over, requests are served again and nothing is left behind.
//!
//! With jobs, processes die at chosen moments of the protocol, too, the store answers late or not at all, and owners pause and
//! cancel. Then, besides:
//!
//! * what a job makes is what it makes in a run that nobody disturbs, and it ends: well, cancelled, or for the reason it was given;
//! * a step is committed once all ranks have voted for it, none twice; what was in progress is computed again, and per death of
//!   a scheduler one step more (where not every step is durable: those since the last one that is);
//! * a job's events are numbered without a gap, in order of time, and tell every step once;
//! * a name is shown once every rank of every replica that serves has had its adapter, and who asks for a name gets what it
//!   stood for then, in every token;
//! * no blob that a record needs is ever deleted, and every one that a record has ever named and none needs is.
//!
//! **Invariants:** no clock, no I/O, no threads, no randomly seeded map: a seed always gives the same run.
#![forbid(unsafe_code)]

mod aftermath;
mod archive;
mod durable;
mod gateway;
mod node;
mod observed;
mod oracle;
mod owner;
pub mod plan;
mod process;
mod random;
mod scenario;
mod scheduler;
mod session;
mod shelf;
mod tuning;
mod watch;
mod weights;
mod world;

pub use observed::Observed;

use std::fmt;

/// What a run has seen.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Requests that finished.
    pub finished: u64,
    /// Requests that failed with an error.
    pub failed: u64,
    /// Requests whose client left or whose gateway died.
    pub left: u64,
    /// Tokens that clients received.
    pub tokens: u64,
    /// Steps completed.
    pub steps: u64,
    /// Sequences that were computed again, with the same bits.
    pub audits: u64,
    /// Sequences preempted.
    pub preemptions: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Slices of logits that a rank computed for the one that samples.
    pub head_slices: u64,
    /// Times that a replica came up.
    pub replica_starts: u64,
    /// Times that a replica was lost.
    pub replica_losses: u64,
    /// Faults injected.
    pub faults: u64,
    /// Messages lost.
    pub lost: u64,
    /// Messages delivered twice.
    pub duplicated: u64,
    /// Messages delivered out of order.
    pub reordered: u64,
    /// Jobs whose model is served, or whose files are handed out.
    pub jobs_succeeded: u64,
    /// Jobs that failed, as they had to.
    pub jobs_failed: u64,
    /// Jobs that their owners cancelled.
    pub jobs_cancelled: u64,
    /// Training steps begun.
    pub train_steps: u64,
    /// Of them, those that had been begun before.
    pub repeated_steps: u64,
    /// Requests that received tokens of an adapter.
    pub adapted: u64,
    /// Superseded blobs deleted.
    pub blobs_deleted: u64,
    /// Blobs left to the sweep, which no record ever named.
    pub blobs_left: u64,
}

impl Report {
    /// Sum of two reports.
    pub fn and(self, other: Report) -> Report {
        Report {
            finished: self.finished + other.finished,
            failed: self.failed + other.failed,
            left: self.left + other.left,
            tokens: self.tokens + other.tokens,
            steps: self.steps + other.steps,
            audits: self.audits + other.audits,
            preemptions: self.preemptions + other.preemptions,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            head_slices: self.head_slices + other.head_slices,
            replica_starts: self.replica_starts + other.replica_starts,
            replica_losses: self.replica_losses + other.replica_losses,
            faults: self.faults + other.faults,
            lost: self.lost + other.lost,
            duplicated: self.duplicated + other.duplicated,
            reordered: self.reordered + other.reordered,
            jobs_succeeded: self.jobs_succeeded + other.jobs_succeeded,
            jobs_failed: self.jobs_failed + other.jobs_failed,
            jobs_cancelled: self.jobs_cancelled + other.jobs_cancelled,
            train_steps: self.train_steps + other.train_steps,
            repeated_steps: self.repeated_steps + other.repeated_steps,
            adapted: self.adapted + other.adapted,
            blobs_deleted: self.blobs_deleted + other.blobs_deleted,
            blobs_left: self.blobs_left + other.blobs_left,
        }
    }
}

/// Something that must never happen, with the seed that shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Run it again with [`replay`], or [`replay_with_jobs`].
    pub seed: u64,
    /// When, in microseconds of virtual time.
    pub at_us: u64,
    /// What.
    pub what: String,
    /// The last events before it, if the run was traced.
    pub trace: Vec<String>,
}

impl std::error::Error for Violation {}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        write!(f, "seed {} at {:.3} ms: {}", self.seed, self.at_us as f64 / 1000.0, self.what)
    }
}

/// Runs one seed.
///
/// # Errors
/// The first [`Violation`], without a trace.
pub fn run(seed: u64) -> Result<Report, Violation> {
    world::World::new(seed, false, false).run()
}

/// As [`run`]; a violation carries the events before it.
///
/// # Errors
/// The first [`Violation`].
pub fn replay(seed: u64) -> Result<Report, Violation> {
    world::World::new(seed, false, true).run()
}

/// Runs one seed of a world in which fine-tuning jobs train beside the streams.
///
/// # Errors
/// The first [`Violation`], without a trace.
pub fn run_with_jobs(seed: u64) -> Result<Report, Violation> {
    world::World::new(seed, true, false).run()
}

/// As [`run_with_jobs`]; a violation carries the events before it.
///
/// # Errors
/// The first [`Violation`].
pub fn replay_with_jobs(seed: u64) -> Result<Report, Violation> {
    world::World::new(seed, true, true).run()
}

/// Runs one seed, with fine-tuning jobs or without, and tells what was seen, in order.
///
/// # Errors
/// The first [`Violation`], without a trace.
pub fn observe(seed: u64, with_jobs: bool) -> Result<Vec<Observed>, Violation> {
    world::World::new(seed, with_jobs, false).observe()
}
