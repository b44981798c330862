//! Both places for blobs pass one suite; what belongs to one alone stands beside it.
#![allow(clippy::unwrap_used, missing_docs)]

mod data;
mod directory;
mod fake_s3;
mod manifest;
mod s3;
mod signature;
mod suite;
mod sweep;
