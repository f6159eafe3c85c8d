//! Sampling chains of thought with predictions.

/// Why a rollout ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced its end token.
    Eos,
    /// The text ended with a stop string.
    Stop,
    /// The length limit was reached.
    Length,
}

/// A sampled reply to one task.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Ordinal of the task.
    pub ordinal: u64,
    /// Number of the sample within its group.
    pub sample: u32,
    /// Sampled token ids, the end token included.
    pub tokens: Vec<u32>,
    /// Log-probability (natural log) of each token under the model at temperature 1, untruncated.
    pub logprobs: Vec<f32>,
    /// Log-probability of each token under the tempered, untruncated model: the policy that is trained.
    pub policy_logprobs: Vec<f32>,
    /// Log-probability of each token under the distribution it was drawn from.
    pub sampling_logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
    /// Optimiser updates behind the weights that sampled it.
    pub policy_version: u64,
}
