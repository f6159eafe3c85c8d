//! Attention on the device: over forests, forward and backward, and over pages, against attention in f64 by the rule of
//! who sees whom, and against itself bit for bit.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod forward;
mod gradients;
mod paged;
mod quantized;
mod reference;

#[path = "../cuda_emulator/mod.rs"]
mod cuda_emulator;
