//! The shell over real sockets: nodes and gateways of our own, everything else as it runs.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod harness;
mod identities;
mod jobs;
mod keys;
#[path = "../model/mod.rs"]
mod model;
mod models;
#[allow(dead_code, reason = "shared with the engine's tests")]
#[path = "../engine/rank.rs"]
mod rank;
mod serving;
