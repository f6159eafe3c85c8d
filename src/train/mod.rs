//! Learning from scored rollouts: advantages, policy losses, schedules and optimisers.

pub mod advantage;
pub mod loss;
pub mod optimizer;
pub mod schedule;
