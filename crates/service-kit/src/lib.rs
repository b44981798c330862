//! What the process shell of every role shares.
//!
//! Layout: [`config`] (files to validated structs), [`addresses`] (one or several in a configuration), [`retries`] (attempts to reach one of them), [`telemetry`] (logs and traces, with [`trace_context`] for our own
//! wire messages), [`drain`] (signals to an orderly end), [`health`] (is this process ready), [`clock`] (time for the
//! shells around pure cores), [`lock`] (files that one process holds), [`memory`] (what the process uses and may use), [`watchdog`] (signs of life to a supervisor).
//!
//! **Invariants:** nothing here knows a role, a message or a model. Time-outs and leases never use the wall clock.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod clock;
pub mod config;
pub mod drain;
pub mod health;
pub mod lock;
pub mod memory;
pub mod retries;
pub mod telemetry;
pub mod trace_context;
pub mod watchdog;

mod otlp_client;

pub use addresses::Addresses;
pub use clock::{Clock, Millis, SystemClock};
pub use config::ConfigError;
pub use drain::{Serving, Shutdown, ShutdownReason, ShutdownRequest};
pub use health::{Health, Readiness};
pub use memory::{available_memory, resident_bytes};
pub use retries::Retries;
pub use telemetry::{TelemetryConfig, TelemetryError, TelemetryGuard};
pub use trace_context::{current_traceparent, set_parent};
pub use watchdog::Watchdog;
