//! The CUDA ground: devices, memory, launches, graphs and their failures, on a GPU where there is one and on the
//! emulated device otherwise; and the emulated device itself.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod cuda_emulator;

#[path = "cuda/defects.rs"]
mod defects;
#[path = "cuda/failures.rs"]
mod failures;
#[path = "cuda/ground.rs"]
mod ground;
#[path = "cuda/instructions.rs"]
mod instructions;
#[path = "cuda/products.rs"]
mod products;
