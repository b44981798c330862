//! The engine against ranks of our own, whose KV cache remembers what was written where.

mod adapters;
mod fairness;
mod lifecycle;
mod limits;
mod micro_batches;
mod preemption;
mod prefix;
mod random;
mod rank;
mod refills;
mod repeats;
mod replays;
mod world;
