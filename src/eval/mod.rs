//! Next-token accuracy, plain and reasoned, on held-out positions; and position scores by a proxy.

mod accuracy;
mod bootstrap;
mod proxy;

pub use accuracy::{Answer, EvalSet, plain, prompts, reasoned, reply_bytes};
pub use bootstrap::interval;
pub use proxy::ModelProxy;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Accuracy over some positions with its confidence interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of right predictions.
    pub accuracy: f64,
    /// Bootstrap interval (2.5 % to 97.5 %, resampled by document).
    pub ci: [f64; 2],
    /// Number of positions.
    pub n: u64,
}

/// Accuracy over all positions and over each group of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Breakdown {
    /// Over all positions; groups weigh as they are.
    #[serde(flatten)]
    pub all: Accuracy,
    /// Over each group (label or entropy band), by name.
    pub by_band: BTreeMap<String, Accuracy>,
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// At the positions that the held-out corpus marks, by label.
    pub marked: Option<Breakdown>,
    /// At every position of the entropy band, by entropy.
    pub band: Option<Breakdown>,
    /// Outcomes by name (reasoned evaluation only).
    pub outcomes: BTreeMap<String, u64>,
    /// Mean tokens of a reply (reasoned evaluation only).
    pub reply_tokens: f64,
    /// Floating-point operations, counted from shapes.
    pub flops: u64,
}
