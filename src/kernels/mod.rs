//! Fused operations with their backward passes, one file per operation.
//!
//! Two rules hold in every forward operation. Each output element is one chain of fused
//! multiply-adds in a fixed order, and every reduction runs over sixteen lanes in a fixed tree.
//! A result therefore depends neither on the batch it was computed in, nor on the number of
//! threads, nor on the instruction set: decoding, prefill and training give the same bits.
//!
//! Slices must have the shapes that the functions state: a wrong one is a defect of the caller and
//! panics.

#![allow(clippy::missing_panics_doc, reason = "stated above for the whole room")]
#![allow(clippy::inline_always, reason = "bodies must be compiled for their caller's instruction set")]

pub mod attention;
pub mod dtype;
pub mod elementary;
pub mod head;
pub mod matmul;
pub mod norm;
pub mod packed;
pub(crate) mod pairs;
pub mod parallel;
pub mod rotary;
pub mod simd;
pub mod swiglu;

/// Lanes of every vector operation, on every instruction set.
pub const LANES: usize = 16;

/// The next multiple of [`LANES`].
pub const fn pad(n: usize) -> usize {
    n.div_ceil(LANES) * LANES
}
