//! Tests of the whole: real processes, real sockets, real clients.
//!
//! Layout: [`browser`] is a real one, [`cluster`] starts `ashlar up` and holds it for a test, [`http`] is a blocking client that can also send what
//! no client library would, [`machines`] are others that join it, [`material`] are small models and adapters, [`tuning`] has jobs as a client has them, [`wait`] polls conditions with a deadline, [`shared`] finds data that lies beside the
//! repository.
//!
//! The binary must have been built: `cargo build --release -p ashlar`, or name one with `ASHLAR_BIN`.
#![forbid(unsafe_code)]

pub mod browser;
pub mod cluster;
pub mod http;
pub mod machines;
pub mod material;
pub mod processes;
pub mod shared;
pub mod streams;
pub mod tuning;
pub mod wait;

pub use browser::Browser;
pub use cluster::{Cluster, Ended, run_to_end};
pub use http::{Answer, Event, EventStream};
pub use wait::{eventually, until};
