//! The engine: what it is asked, and what it gives, wherever it computes.

use super::sampler::{Draw, Sampling};
use super::{Finish, Prompt, Rollout, host};
use crate::config::CacheFormat;
use crate::model::{Decoder, Forest, ModelError, on_device};
use crate::random::Stream;
use crate::tokenize::Tokenizer;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Replies that grow side by side: more gain nothing on the CPU.
pub(super) const REPLIES_AT_ONCE: usize = 256;

/// When a reply ends.
#[derive(Clone)]
pub struct StopRule<'a> {
    /// End tokens.
    pub eos: Vec<u32>,
    /// Stop strings.
    pub strings: &'a [String],
    /// Spells tokens, for stop strings.
    pub tokenizer: &'a Tokenizer,
    /// Longest reply in tokens.
    pub max_new_tokens: usize,
}

impl StopRule<'_> {
    fn finish(&self, tokens: &[u32], text: &mut Vec<u8>) -> Option<Finish> {
        let last = *tokens.last()?;
        if self.eos.contains(&last) {
            return Some(Finish::Eos);
        }
        if !self.strings.is_empty() {
            text.extend_from_slice(self.tokenizer.token_bytes(last));
            if self.strings.iter().any(|stop| text.ends_with(stop.as_bytes())) {
                return Some(Finish::Stop);
            }
        }
        (tokens.len() >= self.max_new_tokens).then_some(Finish::Length)
    }
}

/// Rollouts and what they cost.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// The samples of each prompt, in the order of the prompts.
    pub groups: Vec<Vec<Rollout>>,
    /// Prompt tokens that were computed: shared ones once.
    pub unique_prompt_tokens: u64,
    /// Prompt tokens that an engine without sharing would have computed.
    pub repeated_prompt_tokens: u64,
    /// Sampled tokens.
    pub sampled_tokens: u64,
    /// Floating-point operations, counted from shapes.
    pub flops: u64,
    /// Bytes of keys and values: on the CPU those in use when they were most, on a device those set aside.
    pub cache_bytes: u64,
    /// How often a device began again with less, since its memory did not suffice.
    pub retries: u64,
    /// Thread-seconds in prefill and in decoding; what a device computes beside decoding counts as that.
    pub seconds: (f64, f64),
}

/// Samples replies from a decoder.
pub struct Engine<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When replies end.
    pub stop: StopRule<'a>,
    /// Key of the random numbers.
    pub seed: u64,
    /// Optimiser updates behind the decoder's weights, for the record.
    pub policy_version: u64,
    /// Number format of cached keys and values on a device. The CPU keeps its own.
    pub kv_cache: CacheFormat,
    /// Most bytes of cached keys and values, unless the longest prompt with one reply needs more.
    pub cache_bytes: Option<u64>,
}

/// A growing reply, wherever it is computed.
pub(super) struct Growing {
    /// Its random numbers: token n is drawn with value n.
    pub(super) stream: Stream,
    /// Its tokens so far.
    pub(super) rollout: Rollout,
    text: Vec<u8>,
}

impl Engine<'_> {
    /// Samples `samples` replies to every prompt. Prompts of one trunk should stand together.
    ///
    /// # Errors
    /// When a prompt with its reply is longer than the model's positions, is empty, or holds a
    /// token outside the vocabulary; on a device also when it has no room or has failed.
    pub fn generate(&self, prompts: &[Prompt], samples: usize) -> Result<Generation, ModelError> {
        self.check(prompts)?;
        match self.decoder.on_device()? {
            None => host::generate(self, prompts, samples),
            Some(device) => on_device!(&**device, decoder => {
                super::device::generate(self, decoder, prompts, samples, super::device::Limits::of(decoder))
            }),
        }
    }

    fn check(&self, prompts: &[Prompt]) -> Result<(), ModelError> {
        let limit = self.decoder.config().max_positions;
        for prompt in prompts {
            let length = prompt.len().saturating_add(self.stop.max_new_tokens);
            if prompt.is_empty() {
                return Err(ModelError::EmptyPrompt { ordinal: prompt.ordinal });
            }
            if length > limit {
                return Err(ModelError::TooLong { length, limit });
            }
        }
        Ok(())
    }
}

impl Growing {
    /// A reply without a token.
    pub(super) fn new(engine: &Engine, prompt: &Prompt, sample: usize) -> Self {
        Self {
            stream: Stream::new(engine.seed, "rollout").child(prompt.ordinal).child(sample as u64),
            rollout: Rollout {
                ordinal: prompt.ordinal,
                sample: sample as u32,
                tokens: Vec::new(),
                logprobs: Vec::new(),
                policy_logprobs: Vec::new(),
                sampling_logprobs: Vec::new(),
                finish: Finish::Length,
                policy_version: engine.policy_version,
            },
            text: Vec::new(),
        }
    }

    /// Whether the newest token ends it; to be asked once for each token.
    pub(super) fn ends(&mut self, stop: &StopRule) -> bool {
        let finish = stop.finish(&self.rollout.tokens, &mut self.text);
        self.rollout.finish = finish.unwrap_or(self.rollout.finish);
        finish.is_some()
    }

    /// Adds a token.
    pub(super) fn push(&mut self, drawn: Draw) {
        self.rollout.tokens.push(drawn.token);
        self.rollout.logprobs.push(drawn.logprob);
        self.rollout.policy_logprobs.push(drawn.policy_logprob);
        self.rollout.sampling_logprobs.push(drawn.sampling_logprob);
    }
}

/// Prompts of one trunk that stand together.
pub(super) fn families(prompts: &[Prompt]) -> impl Iterator<Item = &[Prompt]> {
    prompts.chunk_by(|a, b| Arc::ptr_eq(&a.trunk, &b.trunk))
}

/// The prompts that share one computation of their trunk, so far as work is counted.
pub(super) fn parts(prompts: &[Prompt], samples: usize) -> impl Iterator<Item = &[Prompt]> {
    families(prompts).flat_map(move |family| family.chunks(prompts_at_once(samples)))
}

/// Most prompts that one computation of their trunk serves.
fn prompts_at_once(samples: usize) -> usize {
    (REPLIES_AT_ONCE / samples.max(1)).max(1)
}

/// Adds a prompt's trunk as a chain of segments that ends at each wanted length, and where else passes cut it; returns the
/// segment that ends at each. Length 0 has none.
pub(crate) fn add_trunk(
    forest: &mut Forest,
    Prompt { trunk, cuts, .. }: &Prompt,
    lengths: impl Iterator<Item = usize>,
) -> BTreeMap<usize, usize> {
    let mut ends: BTreeMap<usize, usize> =
        lengths.filter(|length| *length > 0).map(|length| (length, 0)).collect();
    let longest = ends.last_key_value().map_or(0, |(length, _)| *length);
    let between = cuts.iter().filter(|cut| (1..longest).contains(*cut));
    ends.extend(between.map(|cut| (*cut, 0)));
    let (mut parent, mut start) = (None, 0);
    for (length, segment) in &mut ends {
        *segment = forest.add(parent, &trunk[start..*length]);
        (parent, start) = (Some(*segment), *length);
    }
    ends
}
