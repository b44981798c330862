//! The bits of blocks: what they mean, and how values become blocks.
//!
//! Layout: [`UnpackedBlock`] (`unpacked.rs`: pieces of a block as plain integers, and back), `dequantize.rs`,
//! `quantize.rs` (the types with blocks of 32), `superblock.rs` (the K-quants) with `search.rs` (their scales).
//!
//! These are the reference codecs: clear before fast. Decoding gives exactly the f32 that ggml defines: scales widen
//! from f16, every product and difference is rounded on its own, in the order that [`UnpackedBlock::value`] states.
//! Encoding is deterministic and depends on the block's own values alone.

mod dequantize;
mod quantize;
mod search;
mod superblock;
mod unpacked;

pub use dequantize::dequantize;
pub use quantize::quantize;
pub use unpacked::{UnpackedBlock, pack, unpack};

use crate::types::TensorType;

/// Why bytes or values are no blocks.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum BlockError {
    /// The bytes are not a whole number of blocks, or not the asked number.
    #[error("{bytes} bytes are not {blocks} blocks of {tensor_type}, which have {} bytes each", tensor_type.block_bytes())]
    Bytes {
        /// The type that was asked for.
        tensor_type: TensorType,
        /// How many bytes there were.
        bytes: usize,
        /// How many blocks were expected.
        blocks: usize,
    },
    /// The number of values is not a multiple of the block.
    #[error("{values} values are no whole number of {tensor_type} blocks of {}: choose a type with shorter blocks", tensor_type.block_len())]
    Values {
        /// The type that was asked for.
        tensor_type: TensorType,
        /// How many values there were.
        values: usize,
    },
    /// Blocks of one float each have no pieces.
    #[error("{tensor_type} has no scales and integers to unpack: dequantize it instead")]
    NotQuantized {
        /// The type that was asked for.
        tensor_type: TensorType,
    },
    /// A value is infinite or not a number.
    #[error("value {index} is {value}: only finite values can be quantized to {tensor_type}")]
    NotFinite {
        /// The type that was asked for.
        tensor_type: TensorType,
        /// Position among the given values.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The scale of a block exceeds the largest f16.
    #[error(
        "values from index {index} on are too large for {tensor_type}: their scale exceeds 65504; use f32 or bf16"
    )]
    TooLarge {
        /// The type that was asked for.
        tensor_type: TensorType,
        /// Position of the block's first value among the given values.
        index: usize,
    },
}
