//! Sampling chains of thought with predictions.
//!
//! A rollout's tokens depend only on (seed, ordinal, sample) and the weights: random numbers are
//! counter-based and the decoder's bits do not depend on the batch.

#[cfg(feature = "cuda")]
pub mod device;
mod engine;
mod host;
mod sampler;

pub(crate) use engine::add_trunk;
pub use engine::{Engine, Generation, StopRule};
pub use sampler::{Draw, Sampling, argmax, draw};

use std::collections::BTreeSet;
use std::sync::Arc;

/// What a reply continues: some tokens of a trunk that other prompts may share, then a footer.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Ordinal of the task.
    pub ordinal: u64,
    /// Header and document tokens, shared by the tasks of a document.
    pub trunk: Arc<[u32]>,
    /// How many tokens of the trunk belong to this prompt.
    pub length: usize,
    /// How many of them are header, not document.
    pub header: usize,
    /// What follows them.
    pub footer: Arc<[u32]>,
    /// Lengths of all prompts that are sampled of this trunk, shortest first. Every pass cuts it there, so that a device
    /// computes the same bits when some of the prompts take part no more. May be empty where that does not matter.
    pub cuts: Arc<[usize]>,
}

impl Prompt {
    /// Tokens of the whole prompt.
    pub fn len(&self) -> usize {
        self.length + self.footer.len()
    }

    /// Says in each prompt where those of its trunk, which stand together, end.
    pub fn note_cuts(prompts: &mut [Self]) {
        for family in prompts.chunk_by_mut(|a, b| Arc::ptr_eq(&a.trunk, &b.trunk)) {
            let lengths: BTreeSet<usize> = family.iter().map(|prompt| prompt.length).collect();
            let cuts: Arc<[usize]> = lengths.into_iter().collect();
            for prompt in family {
                prompt.cuts = Arc::clone(&cuts);
            }
        }
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

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

impl Finish {
    /// Name in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
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
