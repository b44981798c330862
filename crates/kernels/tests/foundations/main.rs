//! What the kernels stand on: elementary functions, narrow numbers, threads and packed memory, through the public interface.
#![allow(clippy::unwrap_used)]

mod dropout;
mod elementary;
mod memory;
mod numbers;
mod threads;
