//! The model's files on a node that was given none: from a node that has them, or from a hub, and only what its slice takes.
//!
//! Layout, in reading order: [`cache`] (where they are kept, as sparse files), [`source`] (who has some), [`peer`] (another node, asked),
//! [`hub`] (a hub, asked), [`fetch`] with [`portions`] (from nothing to a slice that can be loaded), [`locate`] (which of all these a node takes),
//! [`errand`] (what for, and for how long), [`shelf`] (what this node hands out) and [`server`] (handing it out).
//!
//! **Invariants:** a directory of the cache has its name only once its digest was found right, and a byte of it counts as present
//! only once it is durable. Nothing outside of a model's own files is read or written, whatever a peer asks or answers. Neither
//! side computes here: fetching has a thread of its own, and so has each of the few who are served at a time.

mod cache;
mod errand;
mod fetch;
mod hub;
mod locate;
mod peer;
mod portions;
mod server;
mod shelf;
mod source;

#[cfg(test)]
mod tests;

pub(crate) use errand::{Errand, Files};
pub(crate) use server::FileServer;
pub(crate) use shelf::Shelf;
