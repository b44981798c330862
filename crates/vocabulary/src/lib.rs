//! Words that every part of Ashlar shares: identifiers, units, shapes, sampling parameters and the cut of an axis.
//!
//! Layout: [`ids`] (newtypes), [`blob`] (names of stored bytes), [`units`] (bytes, milliseconds), [`parts`] (the eight-part cut that the numeric
//! contract is built on), [`head`] (who computes which of its rows), [`shape`] (what a model looks like, without its weights), [`sampling`] (what a request asks of
//! the sampler), [`weights`] (the types of weights), [`blocks`] and [`packed`] (how they lie in memory), [`memory`] (how much of it a rank needs for them), [`attention`] (what attention works in), [`gradient`] (what backward passes do), [`precision`] (what an owner chooses among them, and for the cache), [`random`] (the counter-based generator), [`schedule`] (the learning rate's course).
//!
//! **Invariant:** this crate imports nothing of ours, performs no I/O and reads no clock.
#![forbid(unsafe_code)]

pub mod attention;
pub mod blob;
pub mod blocks;
pub mod gradient;
pub mod head;
pub mod ids;
pub mod memory;
pub mod packed;
pub mod parts;
pub mod precision;
pub mod random;
pub mod sampling;
pub mod schedule;
pub mod shape;
pub mod units;
pub mod weights;

pub use attention::AttentionMemory;
pub use blob::{BlobId, UnknownBlobId};
pub use gradient::GradientMemory;
pub use head::HeadSlice;
pub use ids::*;
pub use parts::{AxisCut, PARTS};
pub use precision::{FloatType, Precision, UnknownFloatType};
pub use sampling::{GrammarSpec, SamplingParams, TokenLogprob, TokenLogprobs};
pub use schedule::{Decay, Schedule, ScheduleError};
pub use shape::{LayerRange, LayerVectors, ModelShape};
pub use units::Bytes;
pub use weights::{
    LayerWeightTypes, Quantization, UnknownQuantization, UnknownWeightType, WeightType, WeightTypes,
};
