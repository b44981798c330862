//! Fine-tuning jobs, with ranks, gateways, a store and blobs that are made up but answer like real ones.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod full;
mod lifecycle;
mod lists;
mod promoting;
mod random;
mod room;
mod served;
mod tenants;
mod world;
