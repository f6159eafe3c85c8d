//! `rpt`: reinforcement pre-training in one binary.
//!
//! Unlabeled text becomes verifiable next-token reasoning tasks; a model samples chains of thought
//! with predictions; predictions that match the text's own bytes are rewarded; GRPO updates the
//! model. ARCHITECTURE.md describes the rooms and the laws that hold them together.

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod corpus;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod eval;
pub mod hub;
mod json;
pub mod kernels;
pub mod ledger;
pub mod model;
mod ordered;
pub mod pipeline;
pub mod random;
pub mod report;
pub mod reward;
pub mod rollout;
pub mod tasks;
pub mod time;
pub mod tokenize;
pub mod train;

pub use error::{Error, Result};
