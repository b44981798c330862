//! The gateway over HTTP, against a scheduler that answers as each test says, over the real protocol.
#![allow(clippy::unwrap_used)]

mod access;
mod admin;
mod chat;
mod client;
mod comparison;
mod completions;
mod edge;
mod errors;
mod faults;
mod files;
mod http;
mod jobs;
mod models;
mod observe;
mod reference;
mod responses;
mod scheduler;
mod system;
mod tools;
mod validation;
mod world;
