//! What a role is told before it starts: flags go before the environment, that before a file, and that before defaults.
//!
//! Layout: [`Schema`] (which keys there are, from the struct itself), [`Sources`] (where values come from), [`Draft`] (the values put
//! together, each with its [`Origin`]), [`Problem`] (what is wrong, all of it at once), `nearest` (the key that was meant), `secrets` (values
//! that may be shown).
//!
//! **Invariants:** values never appear in errors, for they may be secrets. No key is known here: a key that is not in a struct does not
//! exist.

mod draft;
mod nearest;
mod problem;
mod schema;
mod secrets;
mod sources;

pub use draft::{Draft, Effective};
pub use nearest::nearest;
pub use problem::{ConfigError, Origin, Problem};
pub use schema::{Found, Key, Kind, Schema};
pub use secrets::{Secret, masked};
pub use sources::Sources;
