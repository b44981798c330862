//! GGUF files: read by position, written as a stream, and the block formats that their tensors use.
//!
//! Layout: [`types`] (which element types there are), [`blocks`] (their bits: unpack, dequantize, quantize).
//!
//! **Invariants:** no mapping, no threads, no clock, no model: a tensor is rows of blocks under a name. Nothing is
//! allocated from a length that a file claims before that length was compared with the bytes that are there.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod types;

pub use blocks::{BlockError, UnpackedBlock, dequantize, quantize, unpack};
pub use types::{TensorType, UnsupportedType};
