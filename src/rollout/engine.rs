//! The engine: shared prefixes are computed once, then all live replies grow together.

use super::sampler::{Draw, Sampling, draw};
use super::{Finish, Prompt, Rollout};
use crate::config::CacheFormat;
use crate::model::{Decoder, Extension, Forest, KvCache, ModelError, NodeId, Workspace, on_device};
use crate::random::Stream;
use crate::tokenize::Tokenizer;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Replies that grow side by side.
const REPLIES_AT_ONCE: usize = 256;
/// Parameters up to which each thread grows replies of its own, however few.
const SMALL_MODEL: usize = 16 << 20;
/// Replies that are worth a reading of a larger model's weights; threads share the work on fewer.
const REPLIES_WORTH_THE_WEIGHTS: usize = 32;
/// Logits that one thread holds at a time.
const LOGITS_AT_ONCE: usize = 1 << 23;

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
    /// How often a device began again with less, since its memory did not suffice.
    pub retries: u64,
    /// Thread-seconds in prefill and in decoding.
    pub seconds: (f64, f64),
}

impl Generation {
    fn absorb(&mut self, other: Self) {
        self.groups.extend(other.groups);
        self.unique_prompt_tokens += other.unique_prompt_tokens;
        self.repeated_prompt_tokens += other.repeated_prompt_tokens;
        self.sampled_tokens += other.sampled_tokens;
        self.flops += other.flops;
        self.retries += other.retries;
        self.seconds.0 += other.seconds.0;
        self.seconds.1 += other.seconds.1;
    }
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
}

/// A prompt's place in the cache and the normalised hidden state behind its last token.
struct Prefilled {
    node: NodeId,
    state: Vec<f32>,
}

/// A growing reply in the cache.
struct Live {
    group: usize,
    node: NodeId,
    growing: Growing,
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
            None => self.generate_here(prompts, samples),
            Some(device) => on_device!(&**device, decoder => {
                super::device::generate(self, decoder, prompts, samples, super::device::Limits::of(decoder))
            }),
        }
    }

    /// As [`Engine::generate`], on the CPU.
    fn generate_here(&self, prompts: &[Prompt], samples: usize) -> Result<Generation, ModelError> {
        let parts: Vec<Result<Generation, ModelError>> =
            self.waves(prompts, samples).into_par_iter().map(|prompts| self.wave(prompts, samples)).collect();
        let mut all = Generation::default();
        for part in parts {
            all.absorb(part?);
        }
        Ok(all)
    }

    /// Cuts prompts into waves: of a small model about one for each thread.
    ///
    /// A wave computes each of its trunks once. Cuts therefore fall between trunks, and inside one only
    /// where it has more prompts than any wave may hold: counted tokens and operations, from which the
    /// lengths of later stages are derived, do not depend on the number of threads.
    fn waves<'p>(&self, prompts: &'p [Prompt], samples: usize) -> Vec<&'p [Prompt]> {
        let limit = prompts_at_once(samples);
        let worthwhile = match self.decoder.layout().len() {
            ..=SMALL_MODEL => prompts.len(),
            _ => prompts.len() * samples / REPLIES_WORTH_THE_WEIGHTS,
        };
        let waves_at_once = worthwhile.clamp(1, rayon::current_num_threads().max(1));
        let share = prompts.len().div_ceil(waves_at_once).min(limit);
        let (mut waves, mut start, mut end) = (Vec::new(), 0, 0);
        for part in parts(prompts, samples) {
            if end > start && end - start + part.len() > share {
                waves.push(&prompts[start..end]);
                start = end;
            }
            end += part.len();
        }
        if end > start {
            waves.push(&prompts[start..end]);
        }
        waves
    }

    fn check(&self, prompts: &[Prompt]) -> Result<(), ModelError> {
        let limit = self.decoder.config().max_positions;
        for prompt in prompts {
            let length = prompt.len() + self.stop.max_new_tokens;
            if prompt.is_empty() {
                return Err(ModelError::EmptyPrompt { ordinal: prompt.ordinal });
            }
            if length > limit {
                return Err(ModelError::TooLong { length, limit });
            }
        }
        Ok(())
    }

    /// All replies to some prompts, side by side.
    fn wave(&self, prompts: &[Prompt], samples: usize) -> Result<Generation, ModelError> {
        let start = Instant::now();
        let (mut cache, mut workspace) = (self.decoder.new_cache(), Workspace::default());
        let (prefilled, unique) = self.prefill(prompts, &mut cache, &mut workspace)?;
        let middle = Instant::now();
        let groups = self.decode(prompts, &prefilled, samples, &mut cache, &mut workspace)?;
        let sampled = groups.iter().flatten().map(|rollout| rollout.tokens.len() as u64).sum();
        Ok(Generation {
            groups,
            unique_prompt_tokens: unique,
            repeated_prompt_tokens: prompts.iter().map(|prompt| (prompt.len() * samples) as u64).sum(),
            sampled_tokens: sampled,
            flops: workspace.flops,
            retries: 0,
            seconds: ((middle - start).as_secs_f64(), middle.elapsed().as_secs_f64()),
        })
    }

    /// Computes every prompt, each shared trunk once.
    fn prefill(
        &self,
        prompts: &[Prompt],
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<(Vec<Prefilled>, u64), ModelError> {
        let mut forest = Forest::default();
        let mut ends = Vec::with_capacity(prompts.len());
        for family in families(prompts) {
            let trunks = add_trunk(&mut forest, &family[0], family.iter().map(|prompt| prompt.length));
            for prompt in family {
                ends.push(forest.add(trunks.get(&prompt.length).copied(), &prompt.footer));
            }
        }
        let extensions = forest.enter(cache);
        self.decoder.forward(forest.ids(), &extensions, cache, workspace, None)?;
        let rows: Vec<usize> =
            ends.iter().filter_map(|end| forest.row_before(*end, forest.segments()[*end].length)).collect();
        let states = self.decoder.hidden(workspace, &rows);
        let prefilled = ends
            .iter()
            .zip(states.chunks_exact(self.decoder.config().hidden_size))
            .map(|(end, state)| Prefilled { node: extensions[*end].node, state: state.to_vec() })
            .collect();
        Ok((prefilled, forest.ids().len() as u64))
    }

    fn decode(
        &self,
        prompts: &[Prompt],
        prefilled: &[Prefilled],
        samples: usize,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) -> Result<Vec<Vec<Rollout>>, ModelError> {
        let mut done: Vec<Vec<Option<Rollout>>> = prompts.iter().map(|_| vec![None; samples]).collect();
        let mut live = self.start(prompts, prefilled, samples, cache);
        // The first token of all samples of a prompt comes from one row of logits.
        let states: Vec<f32> = prefilled.iter().flat_map(|prompt| prompt.state.iter().copied()).collect();
        let source: Vec<usize> = live.iter().map(|reply| reply.group).collect();
        self.grow(&mut live, &states, &source, workspace);
        self.collect(&mut live, &mut done, cache);
        while !live.is_empty() {
            let ids: Vec<u32> =
                live.iter().filter_map(|reply| reply.growing.rollout.tokens.last().copied()).collect();
            let extensions: Vec<Extension> = live
                .iter()
                .enumerate()
                .map(|(row, reply)| {
                    cache.extend(reply.node, 1, row);
                    Extension { node: reply.node, rows: row..row + 1 }
                })
                .collect();
            self.decoder.forward(&ids, &extensions, cache, workspace, None)?;
            let rows: Vec<usize> = (0..live.len()).collect();
            let states = self.decoder.hidden(workspace, &rows);
            self.grow(&mut live, &states, &rows, workspace);
            self.collect(&mut live, &mut done, cache);
        }
        Ok(done.into_iter().map(|group| group.into_iter().flatten().collect()).collect())
    }

    fn start(
        &self,
        prompts: &[Prompt],
        prefilled: &[Prefilled],
        samples: usize,
        cache: &mut KvCache,
    ) -> Vec<Live> {
        let mut live = Vec::with_capacity(prompts.len() * samples);
        for (group, prompt) in prompts.iter().enumerate() {
            for sample in 0..samples {
                let node = cache.insert(Some(prefilled[group].node));
                live.push(Live { group, node, growing: Growing::new(self, prompt, sample) });
            }
        }
        live
    }

    /// Adds one token to every live reply; reply i reads the hidden state `source[i]`.
    fn grow(&self, live: &mut [Live], states: &[f32], source: &[usize], workspace: &mut Workspace) {
        let (width, vocabulary) = (self.decoder.config().hidden_size, self.decoder.config().vocab_size);
        let rows_at_once = (LOGITS_AT_ONCE / vocabulary).max(1);
        let mut logits = Vec::new();
        for (block, states) in states.chunks(rows_at_once * width).enumerate() {
            self.decoder.logits(states, &mut logits, workspace);
            let first = block * rows_at_once;
            live.par_iter_mut().zip(source).for_each_init(Vec::new, |scratch, (reply, row)| {
                if let Some(logits) = row
                    .checked_sub(first)
                    .and_then(|row| logits.get(row * vocabulary..(row + 1) * vocabulary))
                {
                    let growing = &mut reply.growing;
                    let uniform = growing.stream.uniform(growing.rollout.tokens.len() as u64);
                    growing.push(draw(logits, &self.sampling, uniform, scratch));
                }
            });
        }
    }

    /// Moves finished replies out and frees their pages.
    fn collect(&self, live: &mut Vec<Live>, done: &mut [Vec<Option<Rollout>>], cache: &mut KvCache) {
        let mut next = Vec::with_capacity(live.len());
        for mut reply in live.drain(..) {
            if reply.growing.ends(&self.stop) {
                cache.release(reply.node);
                let sample = reply.growing.rollout.sample as usize;
                done[reply.group][sample] = Some(reply.growing.rollout);
            } else {
                next.push(reply);
            }
        }
        *live = next;
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

/// Most prompts of a wave.
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
