//! Learning: advantages, policy losses, schedules, optimisers, and the trainer that executes
//! per-token streams of (component, weight) without knowing which algorithm made them.

pub mod advantage;
mod algorithm;
mod batch;
#[cfg(feature = "cuda")]
mod device;
mod host;
pub mod loss;
mod machine;
mod objective;
pub mod optimizer;
pub mod schedule;
mod step;
mod supervised;
mod trainer;

pub use algorithm::{ScoredGroup, policy_batches};
pub use batch::{Component, MicroBatch, Target};
pub use objective::{LARGE_MISMATCH, Totals};
pub use supervised::{Example, supervised_batches};
pub use trainer::{TrainError, Trainer, TrainerState, UpdateStats, UpdateTimes};
