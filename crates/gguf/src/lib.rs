//! GGUF files: read by position, written as a stream, and the block formats that their tensors use.
//!
//! Layout: [`types`] (which element types there are), [`blocks`] (their bits: unpack, dequantize, quantize),
//! [`metadata`] (typed values under keys), [`reader`] (a model's files, by position), [`error`] (what is wrong with them),
//! [`writer`] (files as a stream).
//!
//! **Invariants:** no mapping, no threads, no clock, no model: a tensor is rows of blocks under a name. Nothing is
//! allocated from a length that a file claims before that length was compared with the bytes that are there.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod error;
pub mod metadata;
pub mod reader;
pub mod types;
pub mod writer;

pub use blocks::{BlockError, UnpackedBlock, dequantize, quantize, unpack};
pub use error::GgufError;
pub use metadata::{Array, Metadata, Value};
pub use reader::{GgufFiles, TensorInfo, TensorReader};
pub use types::{TensorType, UnsupportedType};
pub use writer::{GgufHeader, GgufWriteError, GgufWriter};
