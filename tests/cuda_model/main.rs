//! The model on a CUDA device against the model on the CPU: scores, gradients, updates, rollouts; and against itself, bit
//! for bit, in the mode `batch_invariant`.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

mod decoder;
mod engine;
mod fast;
mod golden;
mod quantized;
mod scoring;
mod support;
mod trainer;

#[path = "../cuda_emulator/mod.rs"]
mod cuda_emulator;
