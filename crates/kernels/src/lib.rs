//! Numeric kernels on the CPU: pure functions over `f32` slices, with one definition of every result's bits.
//!
//! Layout, in reading order: [`isa`](Isa) and `lanes` (sixteen lanes over three instruction sets), [`pool`](ThreadPool)
//! (threads), `background` (work that gives way), [`cores`](available_cores) (where they run), `matmul` with [`PackedMatrix`] (products), `tree` (sums over parts and ranks), `norm`, `rope`,
//! `elementwise`, `dropout`, `elements` (narrower numbers), `attention` (paged, splits of 256 keys), `softmax` (log-sum-exp), [`sampling`], [`math`] (elementary
//! functions) and [`measure`] (what this machine can do).
//!
//! **Invariants.**
//! - A result depends on its own row's inputs and on shapes alone: not on the other rows of a call, the number of
//!   threads, the instruction set or the order in which tasks ran. Every kernel is written once, over sixteen lanes; a
//!   lane of AVX-512, AVX2 and of the portable code performs the same scalar operations.
//! - Lanes hold outputs, never terms of one sum, except where a reduction says so (sixteen accumulators, index modulo 16,
//!   then a fixed tree).
//! - No libm: elementary functions are fixed sequences of IEEE operations. `mul_add` is the correctly rounded fused
//!   operation, and nothing else is fused.
//! - No randomness (masks are functions of keys that a caller has), no clock (but for [`measure`], and in the pool, whose clock no result sees), no I/O, no model: of ours this crate imports only the vocabulary.
//! - A shape that does not fit is a programming error and panics; what a caller can meet at run time is a typed error.

mod adamw;
mod aligned;
mod attention;
mod background;
mod cores;
mod dropout;
mod elements;
mod elementwise;
mod half;
mod isa;
mod kernels;
mod lanes;
pub mod math;
mod matmul;
pub mod measure;
mod norm;
mod pool;
mod rope;
pub mod sampling;
mod softmax;
mod strided;
mod transpose;
mod tree;

pub use adamw::AdamW;
pub use aligned::AlignedBuffer;
pub use attention::{AttentionShape, BLOCK_TOKENS, KvBuffer, KvLayout, RowContext, SPLIT_KEYS};
pub use background::{Raised, YieldFlag, lower_priority};
pub use cores::{PinError, PinnedThread, available_cores, available_threads};
pub use dropout::{Dropout, DropoutRow};
pub use isa::{Isa, UnknownIsa};
pub use kernels::Kernels;
pub use matmul::{
    BlockAxis, BlockScale, FileRows, Input, Output, PACKED_VERSION, PackedMatrix, Piece, Product,
    QuantizedRow, ReadRows, SegmentLayout, StoredSegment,
};
pub use pool::ThreadPool;
pub use rope::{Llama3Scaling, inv_freq, scale_inv_freq_linear, scale_inv_freq_llama3};
pub use sampling::{SampleError, Sampled, SamplerScratch, SamplerState};
pub use softmax::{CrossEntropyRow, LogSumExp};
pub use strided::StridedRows;
