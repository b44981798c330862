//! Elementary functions as fixed sequences of IEEE operations: the same bits on every machine, without libm.
//!
//! `f32` exponentials run in lanes (`exp_lanes`, scalar [`exp_f32`]); everything that makes tables or single numbers
//! is `f64` ([`exp`], [`log`], [`pow`], [`sin_cos`]), accurate to about one unit in the last place there.

mod double;
mod single;

pub use double::{exp, log, pow, sin_cos};
pub use single::{LaneFunction, exp_f32};
pub(crate) use single::{exp_lanes, exp_lanes_nonpositive, tanh_lanes};
