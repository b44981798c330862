//! Any bytes on everything that reads bytes of others: files of models, requests, messages between processes, configuration.
//!
//! Layout, in reading order:
//! - [`targets`]: what is tried: a function of bytes, with good inputs and words from which others are made;
//! - [`mutate`] and [`json`]: the making; [`random`]: the numbers behind it;
//! - [`worker`]: a process that tries inputs of one target, one after the other;
//! - [`campaign`]: starts such processes, hears of what they find, and outlives them;
//! - [`allocator`]: counts memory.
//!
//! An input is a function of target, seed and number. So nothing is stored: what fails is named by three words, and made again.
//!
//! **Invariants:** no file from outside the repository is read. An input fails if the process panics anywhere (also where the panic is
//! caught), ends, holds more memory than the target allows, or takes longer.
#![deny(unsafe_code)]

pub mod allocator;
pub mod campaign;
pub mod json;
pub mod mutate;
pub mod random;
pub mod targets;
pub mod worker;

use anyhow::Result;
use mutate::Corpus;
use std::path::Path;

/// Something that reads bytes of others.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// What reads there.
    pub about: &'static str,
    /// What an input may cost.
    pub memory: Memory,
    /// Gets it ready; files may be put into the directory.
    pub open: fn(&Path) -> Result<Subject>,
}

/// What an input may hold in memory while it is read.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Bytes, whatever the input.
    pub fixed: usize,
    /// Bytes for each of the input's own.
    pub per_byte: usize,
}

impl Memory {
    /// What an input of this length may hold.
    pub fn of(self, input: usize) -> usize {
        self.fixed + self.per_byte * input
    }
}

/// Reads an input, and says whether it was accepted.
pub type Read = Box<dyn FnMut(&[u8]) -> bool>;

/// A target that is ready.
pub struct Subject {
    /// What its inputs are made from.
    pub corpus: Corpus,
    /// Reads an input; whether it was accepted.
    pub read: Read,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject").field("seeds", &self.corpus.seeds.len()).finish_non_exhaustive()
    }
}
