//! Linear head + log-softmax + gather + entropy, chunked over the vocabulary and, in training, over
//! rows: full logits of a training batch never exist.
//!
//! The normaliser is built from blocks of [`BLOCK`] logits in order, each reduced over sixteen
//! lanes. The engine, which holds a row of logits to sample from, runs the same blocks, so a
//! sampled token's log-probability has the bits that training computes for it.

use super::dtype::{Dtype, Products};
use super::elementary::{exp, exp_sums, max};
use super::matmul::{Left, Output, matmul, matmul_to, matmul_transposed};
use super::packed::Packed;
use super::parallel::{Disjoint, for_each_item, for_each_row};
use super::simd::multiversion;
use rayon::prelude::*;

/// Vocabulary entries reduced together.
pub const BLOCK: usize = 512;
/// Rows whose logits exist together in training.
const ROWS_AT_ONCE: usize = 256;
/// Rows of a block that a task reduces at least.
const ROWS_PER_TASK: usize = 32;

/// An embedding or output matrix `[vocabulary, hidden]`, cut into blocks of [`BLOCK`] entries and packed.
#[derive(Clone, Debug, Default)]
pub struct PackedHead {
    blocks: Vec<Packed>,
    hidden: usize,
    vocabulary: usize,
}

impl PackedHead {
    /// A matrix of zeros.
    pub fn zeros(dtype: Dtype, vocabulary: usize, hidden: usize) -> Self {
        let block = |first: usize| Packed::zeros(dtype, hidden, BLOCK.min(vocabulary - first));
        let blocks = (0..vocabulary).step_by(BLOCK).map(block).collect();
        Self { blocks, hidden, vocabulary }
    }

    /// Replaces the entries from `first` on; `rows [count, hidden]` is row-major.
    pub fn set_rows(&mut self, first: usize, rows: &[f32]) {
        let (mut first, mut rows) = (first, rows);
        while !rows.is_empty() {
            let (block, at) = (first / BLOCK, first % BLOCK);
            let count = (rows.len() / self.hidden).min(BLOCK - at);
            let (these, rest) = rows.split_at(count * self.hidden);
            self.blocks[block].set_columns(at, these);
            (first, rows) = (first + count, rest);
        }
    }

    /// Copies one entry's row, widened, to `out [hidden]`.
    pub fn row(&self, entry: usize, out: &mut [f32]) {
        self.blocks[entry / BLOCK].column(entry % BLOCK, out);
    }

    /// Changes how products are computed: see [`Packed::set_products`].
    pub fn set_products(&mut self, products: Products) {
        self.blocks.iter_mut().for_each(|block| block.set_products(products));
    }

    /// How products are computed.
    pub fn products(&self) -> Products {
        self.blocks.first().map_or(Products::default(), Packed::products)
    }

    /// Entries of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Logits `[rows, vocabulary]` of hidden states `[rows, hidden]`: for sampling and scoring,
    /// where the caller bounds the number of rows.
    pub fn logits(&self, hidden: &[f32], rows: usize, out: &mut [f32]) {
        assert_eq!(out.len(), rows * self.vocabulary, "output shape");
        let (buffer, stride) = (Disjoint::new(out), self.vocabulary);
        for_each_item(self.blocks.len(), true, |at| {
            let out = Output { buffer, first: at * BLOCK, stride };
            // SAFETY: the entries of this block are this item's alone, the buffer is borrowed, and rows hold all blocks.
            unsafe { matmul_to(Left::rows(hidden, self.hidden), rows, &self.blocks[at], out, false) }
        });
    }
}

/// Running log-sum-exp over blocks of logits, with the sum that the entropy needs.
#[derive(Clone, Copy, Debug)]
pub struct Normalizer {
    inverse_temperature: f32,
    largest: f32,
    sum: f32,
    weighted: f32,
}

impl Normalizer {
    /// A normaliser of `softmax(inverse_temperature` * logits).
    pub fn new(inverse_temperature: f32) -> Self {
        Self { inverse_temperature, largest: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 }
    }

    /// Takes in the next block of logits.
    pub fn add(&mut self, logits: &[f32]) {
        let scale = self.inverse_temperature;
        let block_largest = max(logits);
        let largest = block_largest.max(self.largest);
        let (sum, weighted) = exp_sums(logits, largest, scale);
        let shrink = exp((self.largest - largest) * scale);
        self.sum = self.sum.mul_add(shrink, sum);
        self.weighted = self.weighted.mul_add(shrink, weighted);
        self.largest = largest;
    }

    /// The normaliser of a whole row of logits.
    pub fn of_row(logits: &[f32], inverse_temperature: f32) -> Self {
        let mut normalizer = Self::new(inverse_temperature);
        logits.chunks(BLOCK).for_each(|block| normalizer.add(block));
        normalizer
    }

    /// Largest logit.
    pub fn largest(&self) -> f32 {
        self.largest
    }

    /// ln of the sum of `e^(inverse_temperature` * logit).
    pub fn log_sum(&self) -> f32 {
        self.largest.mul_add(self.inverse_temperature, self.sum.ln())
    }

    /// Log-probability of a logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        (logit - self.largest).mul_add(self.inverse_temperature, -self.sum.ln())
    }

    /// Entropy in nats of the whole distribution.
    pub fn entropy(&self) -> f32 {
        self.log_sum() - self.inverse_temperature * self.weighted / self.sum
    }
}

/// What the head says about one target token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenScore {
    /// Log-probability at temperature 1.
    pub logprob: f32,
    /// Log-probability at the policy's temperature.
    pub policy_logprob: f32,
    /// Entropy in nats at temperature 1.
    pub entropy: f32,
}

/// Log-probabilities of one target per row of `hidden [rows, hidden]`.
pub fn score(
    head: &PackedHead,
    hidden: &[f32],
    targets: &[u32],
    inverse_temperature: f32,
) -> Vec<TokenScore> {
    let mut states = vec![RowState::new(inverse_temperature); targets.len()];
    let mut logits = Vec::new();
    for (at, block) in head.blocks.iter().enumerate() {
        logits.resize(targets.len() * block.columns(), 0.0);
        matmul(Left::rows(hidden, head.hidden), targets.len(), block, &mut logits, false);
        take_in(&mut states, &logits, targets, at);
    }
    states.iter().map(RowState::score).collect()
}

/// Takes the logits of block number `at` into the states of all rows.
fn take_in(states: &mut [RowState], logits: &[f32], targets: &[u32], at: usize) {
    let width = logits.len() / states.len().max(1);
    let rows = states.par_iter_mut().zip(logits.par_chunks_exact(width.max(1))).zip(targets);
    rows.with_min_len(ROWS_PER_TASK).for_each(|((state, logits), target)| {
        state.add(logits, place_in(*target, at));
    });
}

/// Place of an entry of the vocabulary within block number `at`; outside of it when it is elsewhere.
fn place_in(entry: u32, at: usize) -> usize {
    (entry as usize).wrapping_sub(at * BLOCK)
}

#[derive(Clone)]
struct RowState {
    plain: Normalizer,
    tempered: Option<Normalizer>,
    target: f32,
}

impl RowState {
    fn new(inverse_temperature: f32) -> Self {
        let tempered = (inverse_temperature != 1.0).then(|| Normalizer::new(inverse_temperature));
        Self { plain: Normalizer::new(1.0), tempered, target: f32::NAN }
    }

    fn add(&mut self, logits: &[f32], target: usize) {
        self.plain.add(logits);
        if let Some(tempered) = &mut self.tempered {
            tempered.add(logits);
        }
        if let Some(logit) = logits.get(target) {
            self.target = *logit;
        }
    }

    fn policy(&self) -> &Normalizer {
        self.tempered.as_ref().unwrap_or(&self.plain)
    }

    fn score(&self) -> TokenScore {
        TokenScore {
            logprob: self.plain.logprob(self.target),
            policy_logprob: self.policy().logprob(self.target),
            entropy: self.plain.entropy(),
        }
    }

    fn logit_gradient(&self, of: TokenGradient) -> LogitGradient {
        let (normalizer, derivative) = match of {
            TokenGradient::Logprob(derivative) => (&self.plain, derivative),
            TokenGradient::PolicyLogprob(derivative) => (self.policy(), derivative),
        };
        let inverse_temperature = normalizer.inverse_temperature;
        let factor = derivative * inverse_temperature;
        LogitGradient { inverse_temperature, log_sum: normalizer.log_sum(), factor }
    }
}

/// Derivative of a loss with respect to one of the log-probabilities of a [`TokenScore`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenGradient {
    /// With respect to `logprob`.
    Logprob(f32),
    /// With respect to `policy_logprob`.
    PolicyLogprob(f32),
}

/// The gradient of one row of logits: `factor * ([c = target] - p(c))`, p being their softmax at the
/// inverse temperature.
#[derive(Clone, Copy)]
struct LogitGradient {
    inverse_temperature: f32,
    log_sum: f32,
    factor: f32,
}

impl LogitGradient {
    /// Replaces a block of the row's logits by their gradients.
    fn replace(&self, logits: &mut [f32], target: usize) {
        logit_gradients(logits, self.inverse_temperature, self.log_sum, self.factor);
        if let Some(logit) = logits.get_mut(target) {
            *logit += self.factor;
        }
    }
}

/// What is scored: a target for each row.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    /// Hidden states, `[rows, hidden]`.
    pub hidden: &'a [f32],
    /// Tokens, `[rows]`.
    pub targets: &'a [u32],
    /// Inverse temperature of the policy.
    pub inverse_temperature: f32,
}

/// Scores targets, asks `gradient` (in the rows' order) for the derivative of the loss with respect to
/// each score, and adds the gradients of the hidden states `[rows, hidden]` and, where it is trained,
/// of the weight `[vocabulary, hidden]`.
///
/// Logits are computed once, for 256 rows at a time.
/// d logprob(t) / d logit(c) = `inverse_temperature` * ([c = t] - p(c)).
pub fn score_and_backward(
    head: &PackedHead,
    scored: &Scored,
    mut gradient: impl FnMut(usize, &TokenScore) -> TokenGradient,
    grad_hidden: &mut [f32],
    mut grad_weight: Option<&mut [f32]>,
    buffers: &mut ChunkBuffers,
) {
    buffers.hidden.set_passing(head.products());
    let mut chunk = Chunk { head, buffers };
    let values_at_once = ROWS_AT_ONCE * head.hidden;
    let inputs = scored.hidden.chunks(values_at_once).zip(grad_hidden.chunks_mut(values_at_once));
    let chunks = scored.targets.chunks(ROWS_AT_ONCE).zip(inputs);
    for (number, (targets, (hidden, grad_hidden))) in chunks.enumerate() {
        let states = chunk.score(hidden, targets, scored.inverse_temperature);
        let rows = states.iter().zip(number * ROWS_AT_ONCE..);
        let gradients: Vec<LogitGradient> =
            rows.map(|(state, row)| state.logit_gradient(gradient(row, &state.score()))).collect();
        chunk.backward(hidden, targets, &gradients, grad_hidden, grad_weight.as_deref_mut());
    }
}

/// Buffers of [`score_and_backward`], kept between calls.
#[derive(Debug, Default)]
pub struct ChunkBuffers {
    /// One block of the vocabulary after the other, each `[rows, its entries]`.
    logits: Vec<f32>,
    hidden: Packed,
}

/// Some rows of the head's forward and backward pass.
struct Chunk<'a> {
    head: &'a PackedHead,
    buffers: &'a mut ChunkBuffers,
}

impl Chunk<'_> {
    fn score(&mut self, hidden: &[f32], targets: &[u32], inverse_temperature: f32) -> Vec<RowState> {
        let rows = targets.len();
        let mut states = vec![RowState::new(inverse_temperature); rows];
        self.buffers.logits.resize(rows * self.head.vocabulary, 0.0);
        let blocks = self.head.blocks.iter().zip(self.buffers.logits.chunks_mut(rows * BLOCK));
        for (at, (block, logits)) in blocks.enumerate() {
            matmul(Left::rows(hidden, self.head.hidden), rows, block, logits, false);
            take_in(&mut states, logits, targets, at);
        }
        states
    }

    /// Turns the logits into their gradients, and those into the gradients of both factors.
    fn backward(
        &mut self,
        hidden: &[f32],
        targets: &[u32],
        gradients: &[LogitGradient],
        grad_hidden: &mut [f32],
        mut grad_weight: Option<&mut [f32]>,
    ) {
        let (rows, columns) = (targets.len(), self.head.hidden);
        let ChunkBuffers { logits, hidden: packed_hidden } = &mut *self.buffers;
        packed_hidden.pack(hidden, rows, columns, columns);
        let blocks = self.head.blocks.iter().zip(logits.chunks_mut(rows * BLOCK));
        for (at, (block, logits)) in blocks.enumerate() {
            let width = block.columns();
            for_each_row(logits, width, |row, logits| {
                gradients[row].replace(logits, place_in(targets[row], at));
            });
            matmul_transposed(logits, rows, block, grad_hidden, true);
            if let Some(grad_weight) = grad_weight.as_deref_mut() {
                let grad_block = &mut grad_weight[at * BLOCK * columns..][..width * columns];
                matmul(Left::transposed(logits, width), width, packed_hidden, grad_block, true);
            }
        }
    }
}

multiversion! {
    /// Replaces logits by `-factor * probability`.
    fn logit_gradients(logits: &mut [f32], inverse_temperature: f32, log_sum: f32, factor: f32) {
        for logit in logits {
            *logit = -factor * exp(logit.mul_add(inverse_temperature, -log_sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (PackedHead, Vec<f32>, Vec<f32>) {
        let (vocabulary, hidden, rows) = (700, 8, 5);
        let wave = |i: usize, s: f32| (i as f32 * s).sin();
        let weight: Vec<f32> = (0..vocabulary * hidden).map(|i| wave(i, 0.37)).collect();
        let states: Vec<f32> = (0..rows * hidden).map(|i| wave(i, 1.7)).collect();
        let mut head = PackedHead::zeros(Dtype::F32, vocabulary, hidden);
        head.set_rows(0, &weight);
        (head, weight, states)
    }

    /// ln softmax(beta * logits)[target] and the entropy at beta = 1, in double precision.
    fn reference(weight: &[f32], state: &[f32], target: usize, beta: f64) -> (f64, f64) {
        let logits: Vec<f64> = weight
            .chunks(8)
            .map(|row| row.iter().zip(state).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum())
            .collect();
        let log_sum = |beta: f64| logits.iter().map(|l| (beta * l).exp()).sum::<f64>().ln();
        let plain = log_sum(1.0);
        let entropy = logits.iter().map(|l| -(l - plain).exp() * (l - plain)).sum();
        (beta * logits[target] - log_sum(beta), entropy)
    }

    #[test]
    fn scores_agree_with_double_precision_and_with_whole_rows() {
        let (head, weight, states) = example();
        let targets = [0, 511, 512, 699, 300];
        let scores = score(&head, &states, &targets, 1.25);
        let mut logits = vec![0.0; 5 * 700];
        head.logits(&states, 5, &mut logits);
        for (row, target) in targets.iter().enumerate() {
            let state = &states[row * 8..][..8];
            let (tempered, entropy) = reference(&weight, state, *target as usize, 1.25);
            let (plain, _) = reference(&weight, state, *target as usize, 1.0);
            assert!((f64::from(scores[row].policy_logprob) - tempered).abs() < 1e-5);
            assert!((f64::from(scores[row].logprob) - plain).abs() < 1e-5);
            assert!((f64::from(scores[row].entropy) - entropy).abs() < 1e-4);
            let logits = &logits[row * 700..][..700];
            let from_row = Normalizer::of_row(logits, 1.25).logprob(logits[*target as usize]);
            assert_eq!(from_row.to_bits(), scores[row].policy_logprob.to_bits());
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (head, weight, states) = example();
        let targets = [3, 600, 512, 0, 42];
        let derivative = |row: usize| row as f32 * 0.3 - 0.5;
        let beta = |row: usize| if row == 1 { 1.0 } else { 1.25 };
        let loss = |weight: &[f32], states: &[f32]| -> f64 {
            let row = |(row, target): (usize, &u32)| {
                let state = &states[row * 8..][..8];
                let (logprob, _) = reference(weight, state, *target as usize, beta(row));
                f64::from(derivative(row)) * logprob
            };
            targets.iter().enumerate().map(row).sum()
        };
        let (mut grad_hidden, mut grad_weight) = (vec![0.0; states.len()], vec![0.0; weight.len()]);
        let expected = score(&head, &states, &targets, 1.25);
        let mut seen = Vec::new();
        let gradient = |row: usize, score: &TokenScore| {
            seen.push(*score);
            match row {
                1 => TokenGradient::Logprob(derivative(row)),
                _ => TokenGradient::PolicyLogprob(derivative(row)),
            }
        };
        let scored = Scored { hidden: &states, targets: &targets, inverse_temperature: 1.25 };
        let buffers = &mut ChunkBuffers::default();
        score_and_backward(&head, &scored, gradient, &mut grad_hidden, Some(&mut grad_weight), buffers);
        assert_eq!(seen, expected);
        let shifted = |v: &[f32], at: usize, by: f32| {
            let mut v = v.to_vec();
            v[at] += by;
            v
        };
        for (at, grad) in grad_hidden.iter().enumerate() {
            let numeric = (loss(&weight, &shifted(&states, at, 1e-3))
                - loss(&weight, &shifted(&states, at, -1e-3)))
                / 2e-3;
            assert!((numeric - f64::from(*grad)).abs() < 2e-4, "{numeric} {grad}");
        }
        for at in (0..weight.len()).step_by(97) {
            let numeric = (loss(&shifted(&weight, at, 1e-2), &states)
                - loss(&shifted(&weight, at, -1e-2), &states))
                / 2e-2;
            assert!((numeric - f64::from(grad_weight[at])).abs() < 2e-4);
        }
    }

    #[test]
    fn chunks_of_rows_change_no_score() {
        let (head, _, states) = example();
        let rows = 2 * ROWS_AT_ONCE + 3;
        let hidden: Vec<f32> = states.iter().cycle().take(rows * 8).copied().collect();
        let targets: Vec<u32> = (0..rows as u32).map(|row| row % 700).collect();
        let mut seen = Vec::new();
        let gradient = |row: usize, score: &TokenScore| {
            seen.push((row, *score));
            TokenGradient::Logprob(0.0)
        };
        let scored = Scored { hidden: &hidden, targets: &targets, inverse_temperature: 1.25 };
        let buffers = &mut ChunkBuffers::default();
        score_and_backward(&head, &scored, gradient, &mut vec![0.0; rows * 8], None, buffers);
        let expected: Vec<_> = score(&head, &hidden, &targets, 1.25).into_iter().enumerate().collect();
        assert_eq!(seen, expected);
    }
}
