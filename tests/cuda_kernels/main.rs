//! Every kernel that is neither attention nor a matrix product, run on the emulated device against its twin on the CPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod embedding;
mod head;
mod norm;
mod optimizer;
mod reduce;
mod replies;
mod rotary;
mod row_scores;
mod sampling;
mod support;
mod swiglu;

#[path = "../cuda_emulator/mod.rs"]
mod cuda_emulator;
