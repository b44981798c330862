//! The gateway over HTTP, against a scheduler that answers as each test says, over the real protocol.
#![allow(clippy::unwrap_used)]

mod chat;
mod client;
mod completions;
mod errors;
mod faults;
mod http;
mod scheduler;
mod system;
mod tools;
mod world;
