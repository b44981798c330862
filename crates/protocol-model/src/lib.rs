//! The protocol between schedulers, ranks, gateways and the store as three small models, of which every reachable state is looked
//! at: who leads ([`lease`]), what a stream's client receives ([`replay`]), and when a training step counts ([`vote`]).
//!
//! Layout: [`checker`] (explores a model), one module per model, [`observed`] (what a rank, a gateway and a job may be seen doing,
//! against which the simulation's runs are compared).
//!
//! Where a rule of the protocol is a pure piece of a service, the model runs that piece: a rank's fence and sequencer, a gateway's
//! highest term, a choice's transcript. What is around them is written down here, with the same names. Each model has rules that
//! can be switched off, to show that the checker notices.
//!
//! **Invariants:** no clock, I/O or randomness: every run explores the same states in the same order. Nothing that ships depends on
//! this crate.
#![forbid(unsafe_code)]

pub mod checker;
pub mod lease;
pub mod observed;
pub mod replay;
pub mod vote;
