//! Drawing one token from a row of logits.

use crate::kernels::elementary::{exp_in_place, sum};
use crate::kernels::head::{BLOCK, Normalizer};
use std::cell::RefCell;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Temperature; 0 takes the most probable token.
    pub temperature: f32,
    /// Keep the k most probable tokens (0 = all).
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens with at least this mass (1 = all).
    pub top_p: f32,
    /// Drop tokens below this share of the most probable one (0 = none).
    pub min_p: f32,
}

impl Sampling {
    /// The most probable token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Inverse temperature of the policy that these settings sample; greedy counts as 1.
    pub fn inverse_temperature(&self) -> f32 {
        if self.temperature > 0.0 { 1.0 / self.temperature } else { 1.0 }
    }

    fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// A drawn token and its log-probabilities (natural log).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// The token.
    pub token: u32,
    /// Under the model at temperature 1, untruncated.
    pub logprob: f32,
    /// Under the tempered, untruncated model.
    pub policy_logprob: f32,
    /// Under the distribution that it was drawn from.
    pub sampling_logprob: f32,
}

/// How many of the most probable tokens truncation sorts at first.
const SORTED_FIRST: usize = 64;

thread_local! {
    /// Weights of a whole vocabulary, and its tokens while truncation chooses among them.
    static SCRATCH: RefCell<(Vec<f32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Draws a token with the random number `uniform` in [0, 1).
///
/// Truncation follows transformers: temperature, then top-k, then top-p, then min-p, each over
/// what the one before left. Ties go to the smaller id.
pub fn draw(logits: &[f32], sampling: &Sampling, uniform: f64) -> Draw {
    let plain = Normalizer::of_row(logits, 1.0);
    if sampling.temperature <= 0.0 {
        let token = argmax(logits);
        let logprob = plain.logprob(logits[token]);
        return Draw { token: token as u32, logprob, policy_logprob: logprob, sampling_logprob: 0.0 };
    }
    let inverse_temperature = sampling.inverse_temperature();
    let policy = match inverse_temperature {
        1.0 => plain,
        _ => Normalizer::of_row(logits, inverse_temperature),
    };
    let (token, truncated) = SCRATCH.with_borrow_mut(|(weights, kept)| {
        weights.clear();
        weights.extend_from_slice(logits);
        exp_in_place(weights, plain.largest(), inverse_temperature);
        choose(weights, sampling, uniform, kept)
    });
    let logit = logits[token as usize];
    let policy_logprob = policy.logprob(logit);
    let sampling_logprob = truncated.unwrap_or(policy_logprob);
    Draw { token, logprob: plain.logprob(logit), policy_logprob, sampling_logprob }
}

/// A token by the weights of all, and its log-probability under what truncation leaves of them.
fn choose(weights: &[f32], sampling: &Sampling, uniform: f64, kept: &mut Vec<u32>) -> (u32, Option<f32>) {
    if !sampling.truncates() {
        return (walk_row(weights, uniform), None);
    }
    truncate(weights, sampling, kept);
    let mass: f64 = kept.iter().map(|id| f64::from(weights[*id as usize])).sum();
    let token = walk(kept.iter().map(|id| (*id, weights[*id as usize])), uniform * mass);
    (token, Some((f64::from(weights[token as usize]) / mass).ln() as f32))
}

/// Place of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = at;
        }
    }
    best
}

/// The first token at which the running sum of weights passes `target`.
fn walk(weights: impl Iterator<Item = (u32, f32)>, target: f64) -> u32 {
    let (mut sum, mut last) = (0.0, 0);
    for (id, weight) in weights {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = id;
            if sum > target {
                break;
            }
        }
    }
    last
}

/// The first token of a whole row at which the running sum of weights passes `uniform` of all: block by block, and token
/// by token in the block where it does.
fn walk_row(weights: &[f32], uniform: f64) -> u32 {
    let target = uniform * weights.chunks(BLOCK).map(sum).sum::<f64>();
    let mut before = 0.0;
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        let behind = before + sum(block);
        if behind > target {
            let first = (number * BLOCK) as u32;
            return walk((first..).zip(block.iter().copied()), target - before);
        }
        before = behind;
    }
    // Rounding alone can lead here.
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
}

/// Ids that survive top-k, top-p and min-p, most probable first; never none. They are sorted only as far as they survive.
fn truncate(weights: &[f32], sampling: &Sampling, ids: &mut Vec<u32>) {
    let weight = |id: &u32| weights[*id as usize];
    let order = |a: &u32, b: &u32| weight(b).total_cmp(&weight(a)).then(a.cmp(b));
    ids.clear();
    ids.extend(0..weights.len() as u32);
    if sampling.top_k > 0 && sampling.top_k < ids.len() {
        ids.select_nth_unstable_by(sampling.top_k, order);
        ids.truncate(sampling.top_k);
        // The mass below is summed in an order of our own, not in one that the selection leaves.
        ids.sort_unstable();
    }
    let limit = match sampling.top_p {
        ..1.0 => f64::from(sampling.top_p) * ids.iter().map(|id| f64::from(weight(id))).sum::<f64>(),
        _ => f64::INFINITY,
    };
    let floor = sampling.min_p * ids.iter().map(weight).fold(0.0, f32::max);
    let (mut kept, mut before, mut at_once) = (0, 0.0, SORTED_FIRST);
    while kept < ids.len() {
        let rest = &mut ids[kept..];
        let count = at_once.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count, order);
        }
        rest[..count].sort_unstable_by(order);
        let survives = |id: &&u32| {
            let survives = before < limit && weight(id) >= floor;
            before += f64::from(weight(id));
            survives
        };
        let surviving = rest[..count].iter().take_while(survives).count();
        kept += surviving;
        if surviving < count {
            break;
        }
        // Steeply: a vocabulary that survives whole is gone through three times, not once for every few.
        at_once *= 64;
    }
    ids.truncate(kept.max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn probabilities(temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = LOGITS.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }

    fn frequencies(sampling: &Sampling) -> Vec<f64> {
        let mut counts = vec![0.0; LOGITS.len()];
        for n in 0..20_000 {
            let uniform = (f64::from(n) + 0.5) / 20_000.0;
            counts[draw(&LOGITS, sampling, uniform).token as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_tempered_distribution() {
        let sampling = Sampling { temperature: 0.8, ..Sampling { temperature: 1.0, ..Sampling::GREEDY } };
        for (got, want) in frequencies(&sampling).iter().zip(probabilities(0.8)) {
            assert!((got - want).abs() < 1e-3);
        }
    }

    #[test]
    fn logprobs_are_those_of_three_distributions() {
        let sampling = Sampling { temperature: 0.5, top_k: 2, ..Sampling::GREEDY };
        let drawn = draw(&LOGITS, &sampling, 0.9);
        assert_eq!(drawn.token, 3);
        assert!((f64::from(drawn.logprob) - probabilities(1.0)[3].ln()).abs() < 1e-6);
        assert!((f64::from(drawn.policy_logprob) - probabilities(0.5)[3].ln()).abs() < 1e-6);
        assert!((f64::from(drawn.sampling_logprob) - 0.5_f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn truncation_keeps_what_it_should() {
        let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let support = |sampling: Sampling| -> Vec<usize> {
            frequencies(&sampling).iter().enumerate().filter(|(_, f)| **f > 0.0).map(|(at, _)| at).collect()
        };
        assert_eq!(support(Sampling { top_k: 1, ..warm }), [1]);
        assert_eq!(support(Sampling { top_k: 3, ..warm }), [1, 2, 3]);
        assert_eq!(support(Sampling { top_p: 0.5, ..warm }), [1, 3]);
        assert_eq!(support(Sampling { min_p: 0.3, ..warm }), [1, 2, 3]);
        assert_eq!(support(Sampling { top_p: 1e-6, ..warm }), [1]);
    }

    /// Sorting only what survives keeps what sorting everything does.
    #[test]
    fn truncation_of_many_tokens_is_that_of_the_whole_order() {
        let stream = crate::random::Stream::new(5, "weights");
        let weights: Vec<f32> = (0..5000).map(|n| (stream.below(n, 900) as f32 / 300.0).exp()).collect();
        let mut order: Vec<u32> = (0..weights.len() as u32).collect();
        let weight = |id: &u32| weights[*id as usize];
        order.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
        let mut kept = Vec::new();
        for (top_k, top_p, min_p) in [
            (0, 0.001, 0.0),
            (0, 0.02, 0.0),
            (0, 0.9, 0.0),
            (0, 0.999, 0.0),
            (0, 1.0, 1e-6),
            (700, 1.0, 0.0),
            (700, 0.5, 0.0),
            (0, 1.0, 0.9),
            (0, 0.9, 0.5),
        ] {
            let candidates = &order[..if top_k > 0 { top_k } else { order.len() }];
            let mass: f64 = candidates.iter().map(|id| f64::from(weight(id))).sum();
            let (mut before, mut expected) = (0.0, Vec::new());
            for id in candidates {
                if top_p < 1.0 && before >= f64::from(top_p) * mass || weight(id) < min_p * weight(&order[0])
                {
                    break;
                }
                before += f64::from(weight(id));
                expected.push(*id);
            }
            truncate(&weights, &Sampling { temperature: 1.0, top_k, top_p, min_p }, &mut kept);
            assert_eq!(kept, expected, "{top_k} {top_p} {min_p}");
        }
    }

    /// Every token of a row of several blocks is drawn as often as its weight says, up to the last.
    #[test]
    fn a_row_of_many_blocks_is_walked_in_order() {
        let weights: Vec<f32> = (0..1300).map(|id| [3.0, 0.0, 1.0, 0.5][id % 4]).collect();
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut before = 0.0;
        for (id, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            let weight = f64::from(*weight);
            for share in [0.01, 0.5, 0.99] {
                assert_eq!(walk_row(&weights, (before + share * weight) / total), id as u32);
            }
            before += weight;
        }
        assert_eq!(walk_row(&weights, 1.0), 1299);
        assert_eq!(walk_row(&[0.0; 600], 0.5), 0);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(draw(&LOGITS, &Sampling::GREEDY, 0.99).token, 1);
    }
}
