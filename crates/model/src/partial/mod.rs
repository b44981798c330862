//! Model files of which only some bytes are here: what a rank needs of them, and what it has.
//!
//! Such a file is sparse and has its true length, so that everything that reads by position works on it unchanged. Beside it
//! lies a journal (`NAME.present`) of the ranges that are there, and [`WeightFiles`](crate::WeightFiles) refuses to read any
//! other: a hole is an error, never zeros.
//!
//! Layout: [`ranges`] (sets of bytes), [`present`] (the journal), [`files`] (which files make up a model), [`plan`] (what of them
//! names the model, and what a slice is made from).

pub mod files;
pub mod plan;
pub mod present;
pub mod ranges;

pub use files::{ModelFile, ModelFiles, is_plain_name, is_weight_file};
pub use plan::{FileRanges, header_needed, identity_ranges, slice_ranges};
pub use present::{PRESENT_SUFFIX, PresentError, present_path, read_present, write_present};
pub use ranges::RangeSet;

#[cfg(test)]
mod tests;
