//! An independent oracle: candle-transformers, in process, over the same weight files. Its test is all there is here; a
//! package of its own, so that nothing else compiles candle.
#![forbid(unsafe_code)]
