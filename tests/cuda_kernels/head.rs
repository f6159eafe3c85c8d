//! Launches of head.cu against `kernels::head`.

use crate::cuda_emulator::device;
use crate::support::{Format, assert_close, assert_refused, blank, read, store, values};
use half::bf16;
use rpt::cuda::head::{self as launches, Chunk, Sums, Targets};
use rpt::cuda::{Device, Indices, Result};
use rpt::kernels::head::Normalizer;

const BLOCK: usize = 1024;

/// What is known of each row's target.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Scores {
    pub(crate) logprobs: Vec<f32>,
    pub(crate) policy_logprobs: Vec<f32>,
    pub(crate) entropies: Vec<f32>,
    pub(crate) log_sums: Vec<f32>,
}

impl Scores {
    fn of(scores: &launches::Scores) -> Self {
        Self {
            logprobs: read(&scores.logprobs),
            policy_logprobs: read(&scores.policy_logprobs),
            entropies: read(&scores.entropies),
            log_sums: read(&scores.log_sums),
        }
    }
}

fn indices(device: &Device, targets: &[u32]) -> Indices {
    Indices::upload(device, "targets", targets).unwrap()
}

/// Scores of whole rows of logits `[targets.len(), vocabulary]`.
pub(crate) fn scores(device: &Device, logits: &[f32], targets: &[u32], inverse_temperature: f32) -> Scores {
    let vocabulary = logits.len() / targets.len();
    let (logits, tokens) = (store::<f32>(device, logits), indices(device, targets));
    let targets = Targets { tokens: tokens.view(), inverse_temperature };
    Scores::of(&launches::score(device, (&logits).into(), vocabulary, targets).unwrap())
}

/// The same of logits that are given to the device in chunks, the last one first, whose rows are `padding` longer.
fn scores_of_chunks(
    device: &Device,
    logits: &[f32],
    targets: &[u32],
    inverse_temperature: f32,
    chunk: usize,
    padding: usize,
) -> Scores {
    let vocabulary = logits.len() / targets.len();
    let tokens = indices(device, targets);
    let targets = Targets { tokens: tokens.view(), inverse_temperature };
    let mut sums = Sums::new(device, vocabulary, targets).unwrap();
    for first in (0..vocabulary).step_by(chunk).collect::<Vec<_>>().into_iter().rev() {
        let width = chunk.min(vocabulary - first);
        let logits = store::<f32>(device, &cut(logits, vocabulary, first, width, padding));
        let chunk = Chunk { logits: (&logits).into(), stride: width + padding, first, width };
        sums.add(device, chunk).unwrap();
    }
    Scores::of(&sums.scores(device).unwrap())
}

/// Columns `first..first + width` of rows of logits, each followed by NaNs.
fn cut(logits: &[f32], vocabulary: usize, first: usize, width: usize, padding: usize) -> Vec<f32> {
    let rows = logits.chunks_exact(vocabulary);
    rows.flat_map(|row| row[first..first + width].iter().copied().chain(vec![f32::NAN; padding])).collect()
}

fn example(vocabulary: usize) -> (Vec<f32>, Vec<u32>) {
    let logits = values(1, 5 * vocabulary).iter().map(|value| value * 3.0 + 10.0).collect();
    (logits, vec![0, vocabulary as u32 - 1, vocabulary as u32 / 2, 3, 1023.min(vocabulary as u32 - 1)])
}

#[test]
fn scores_agree_with_the_cpu() {
    let device = device();
    for vocabulary in [9, 1024, 2500, 4097] {
        for beta in [1.0, 1.25] {
            let (logits, targets) = example(vocabulary);
            let actual = scores(&device, &logits, &targets, beta);
            for (row, target) in targets.iter().enumerate() {
                let logits = &logits[row * vocabulary..][..vocabulary];
                let (plain, tempered) = (Normalizer::of_row(logits, 1.0), Normalizer::of_row(logits, beta));
                let target = logits[*target as usize];
                assert_close(&[actual.logprobs[row]], &[plain.logprob(target)], 1e-5);
                assert_close(&[actual.policy_logprobs[row]], &[tempered.logprob(target)], 1e-5);
                assert_close(&[actual.entropies[row]], &[plain.entropy()], 1e-5);
                assert_close(&[actual.log_sums[row]], &[tempered.log_sum()], 1e-5);
            }
        }
    }
}

#[test]
fn bits_depend_neither_on_chunks_nor_on_alignment_nor_on_other_rows() {
    let device = device();
    let vocabulary = 3500;
    let (logits, targets) = example(vocabulary);
    let whole = scores(&device, &logits, &targets, 0.8);
    for (chunk, padding) in [(BLOCK, 0), (BLOCK, 3), (2 * BLOCK, 1), (4 * BLOCK, 4)] {
        assert_eq!(scores_of_chunks(&device, &logits, &targets, 0.8, chunk, padding), whole);
    }
    for row in 0..targets.len() {
        let alone = scores(&device, &logits[row * vocabulary..][..vocabulary], &targets[row..=row], 0.8);
        assert_eq!(alone.logprobs, whole.logprobs[row..=row]);
        assert_eq!(alone.policy_logprobs, whole.policy_logprobs[row..=row]);
        assert_eq!(alone.entropies, whole.entropies[row..=row]);
    }
}

/// Inputs of a gradient.
struct Case<'a> {
    logits: &'a [f32],
    vocabulary: usize,
    targets: &'a [u32],
    coefficients: &'a [f32],
    log_sums: &'a [f32],
    inverse_temperature: f32,
}

impl Case<'_> {
    /// Gradient rows of the columns `first..first + width`, or of whole rows where these are all.
    fn gradient<T: Format>(&self, device: &Device, first: usize, width: usize) -> Vec<f32> {
        let vocabulary = self.vocabulary;
        let logits = store::<f32>(device, &cut(self.logits, vocabulary, first, width, 0));
        let mut out = blank::<T>(device, logits.len());
        let tokens = indices(device, self.targets);
        let targets = Targets { tokens: tokens.view(), inverse_temperature: self.inverse_temperature };
        let coefficients = store::<f32>(device, self.coefficients);
        let log_sums = store::<f32>(device, self.log_sums);
        let (logits, coefficients, log_sums) = ((&logits).into(), (&coefficients).into(), (&log_sums).into());
        let to = (&mut out).into();
        let result = if width == vocabulary {
            launches::gradient(device, logits, vocabulary, targets, coefficients, log_sums, to)
        } else {
            let chunk = Chunk { logits, stride: width, first, width };
            launches::chunk_gradient(device, chunk, vocabulary, targets, coefficients, log_sums, to)
        };
        result.unwrap();
        read(&out)
    }

    fn expected(&self, first: usize, width: usize) -> Vec<f32> {
        let beta = f64::from(self.inverse_temperature);
        let rows = self.logits.chunks_exact(self.vocabulary).zip(self.targets).zip(self.coefficients);
        let gradients = rows.flat_map(|((logits, target), coefficient)| {
            let exponent = |at: usize| beta * f64::from(logits[at]);
            let sum: f64 = (0..self.vocabulary).map(|at| exponent(at).exp()).sum();
            let gradient = |at: usize| {
                let hit = f64::from(u8::from(at == *target as usize));
                (f64::from(*coefficient) * beta * (hit - exponent(at).exp() / sum)) as f32
            };
            (first..first + width).map(gradient).collect::<Vec<_>>()
        });
        gradients.collect()
    }
}

fn gradients_agree<T: Format>() {
    let (device, vocabulary, beta) = (device(), 2501, 1.25);
    let (logits, targets) = example(vocabulary);
    let log_sums = scores(&device, &logits, &targets, beta).log_sums;
    let case = Case {
        logits: &logits,
        vocabulary,
        targets: &targets,
        coefficients: &[0.5, -1.0, 0.0, 2.0, -0.25],
        log_sums: &log_sums,
        inverse_temperature: beta,
    };
    for (first, width) in [(0, 1024), (1024, 1477), (0, vocabulary)] {
        let actual = case.gradient::<T>(&device, first, width);
        assert_close(&actual, &case.expected(first, width), T::TOLERANCE.max(1e-5));
    }
}

#[test]
fn gradients_are_those_of_the_policy_log_probability() {
    gradients_agree::<f32>();
    gradients_agree::<bf16>();
}

#[test]
fn gradients_match_finite_differences() {
    let device = device();
    let (logits, targets, beta) = (values(2, 12), [7_u32], 0.7);
    let log_sums = scores(&device, &logits, &targets, beta).log_sums;
    let case = Case {
        logits: &logits,
        vocabulary: 12,
        targets: &targets,
        coefficients: &[1.5],
        log_sums: &log_sums,
        inverse_temperature: beta,
    };
    crate::support::check_gradient(&logits, &case.gradient::<f32>(&device, 0, 12), |logits| {
        1.5 * f64::from(scores(&device, logits, &targets, beta).policy_logprobs[0])
    });
}

#[test]
fn scores_of_what_does_not_fit_are_refused() {
    let device = device();
    let run = |logits: usize, vocabulary: usize, targets: &[u32]| {
        let (logits, tokens) = (blank::<f32>(&device, logits), indices(&device, targets));
        let targets = Targets { tokens: tokens.view(), inverse_temperature: 1.0 };
        launches::score(&device, (&logits).into(), vocabulary, targets)
    };
    assert!(run(0, 10, &[]).unwrap().logprobs.is_empty());
    assert!(run(0, 0, &[]).unwrap().logprobs.is_empty());
    run(20, 10, &[9, 0]).unwrap();
    assert_refused(run(20, 10, &[9, 10]), "targets in the vocabulary: index 10, where there are 10");
    assert_refused(run(19, 10, &[9, 0]), "logits: 19 elements where 20 are");
    let tokens = indices(&device, &[9, 0]);
    let targets = Targets { tokens: tokens.view(), inverse_temperature: 1.0 };
    let logits = blank::<f32>(&device, 2 * 2048);
    let add = |stride: usize, first: usize, width: usize| -> Result<()> {
        let mut sums = Sums::new(&device, 2500, targets)?;
        sums.add(&device, Chunk { logits: (&logits).into(), stride, first, width })
    };
    add(2048, 0, 2048).unwrap();
    add(1024, 1024, 1024).unwrap();
    add(452, 2048, 452).unwrap();
    for (stride, first, width) in [
        (1023, 0, 1024),
        (1024, 512, 1024),
        (1000, 0, 1000),
        (1024, 2048, 1024),
        (453, 2048, 453),
        (1024, usize::MAX - 1023, 1024),
    ] {
        assert_refused(add(stride, first, width), "whole blocks of 1024, or the last ones");
    }
    assert_refused(add(4096, 0, 1024), "logits: 4096 elements where 5120 are");
}

#[test]
fn gradients_of_what_does_not_fit_are_refused() {
    let device = device();
    let run = |lengths: [usize; 4], targets: &[u32]| {
        let [logits, coefficients, log_sums, mut out] = lengths.map(|length| blank::<f32>(&device, length));
        let tokens = indices(&device, targets);
        let targets = Targets { tokens: tokens.view(), inverse_temperature: 1.0 };
        let (logits, coefficients) = ((&logits).into(), (&coefficients).into());
        let log_sums = (&log_sums).into();
        launches::gradient::<f32>(&device, logits, 10, targets, coefficients, log_sums, (&mut out).into())
    };
    run([0; 4], &[]).unwrap();
    run([20, 2, 2, 20], &[9, 0]).unwrap();
    assert_refused(run([20, 2, 2, 20], &[9, 10]), "targets in the vocabulary: index 10");
    assert_refused(run([19, 2, 2, 20], &[9, 0]), "logits: 19 elements where 20 are");
    assert_refused(run([20, 1, 2, 20], &[9, 0]), "coefficients of targets: 1");
    assert_refused(run([20, 2, 1, 20], &[9, 0]), "log-sums of logits: 1");
    assert_refused(run([20, 2, 2, 19], &[9, 0]), "gradients of logits: 19 elements where 20 are");
}
