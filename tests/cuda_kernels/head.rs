//! head.cu against `kernels::head`.

use crate::support::{Arg, FORMATS, Gpu, assert_close, suffix, tolerance, values};
use rpt::kernels::dtype::Dtype;
use rpt::kernels::head::Normalizer;

const BLOCK: usize = 1024;

/// What `head_scores` says about each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Scores {
    pub(crate) logprobs: Vec<f32>,
    pub(crate) policy_logprobs: Vec<f32>,
    pub(crate) entropies: Vec<f32>,
    pub(crate) log_sums: Vec<f32>,
}

/// Scores of full logits `[targets.len(), vocabulary]`, given to the device in chunks whose rows are `padding` longer.
pub(crate) fn scores(
    gpu: &Gpu,
    logits: &[f32],
    targets: &[u32],
    beta: f32,
    chunk: usize,
    padding: usize,
) -> Scores {
    let (rows, vocabulary) = (targets.len(), logits.len() / targets.len());
    let blocks = vocabulary.div_ceil(BLOCK);
    let sums = gpu.floats(&vec![f32::NAN; rows * blocks * 4]);
    let (target_logits, targets) = (gpu.floats(&vec![f32::NAN; rows]), gpu.words(targets));
    for first in (0..vocabulary).step_by(chunk).collect::<Vec<_>>().into_iter().rev() {
        let width = chunk.min(vocabulary - first);
        let chunk = gpu.floats(&cut(logits, vocabulary, first, width, padding));
        let warps = rows * width.div_ceil(BLOCK);
        gpu.launch(
            "head_sums",
            (warps.div_ceil(8), 1),
            256,
            &[
                Arg::To(&chunk),
                Arg::Int(width + padding),
                Arg::Int(width),
                Arg::Int(first),
                Arg::To(&targets),
                Arg::Float(beta),
                Arg::To(&sums),
                Arg::Int(blocks),
                Arg::To(&target_logits),
                Arg::Int(rows),
            ],
        );
    }
    let outputs: Vec<_> = (0..4).map(|_| gpu.floats(&vec![f32::NAN; rows])).collect();
    let mut arguments = vec![Arg::To(&sums), Arg::Int(blocks), Arg::To(&target_logits), Arg::Float(beta)];
    arguments.extend(outputs.iter().map(Arg::To));
    arguments.push(Arg::Int(rows));
    gpu.launch("head_scores", (rows.div_ceil(8), 1), 256, &arguments);
    let [logprobs, policy_logprobs, entropies, log_sums] = [0, 1, 2, 3].map(|at| outputs[at].floats());
    Scores { logprobs, policy_logprobs, entropies, log_sums }
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
    let gpu = Gpu::new();
    for vocabulary in [9, 1024, 2500, 4097] {
        for beta in [1.0, 1.25] {
            let (logits, targets) = example(vocabulary);
            let actual = scores(&gpu, &logits, &targets, beta, 2 * BLOCK, 0);
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
    let gpu = Gpu::new();
    let vocabulary = 3500;
    let (logits, targets) = example(vocabulary);
    let whole = scores(&gpu, &logits, &targets, 0.8, 4 * BLOCK, 0);
    for (chunk, padding) in [(BLOCK, 0), (BLOCK, 3), (2 * BLOCK, 1), (4 * BLOCK, 4)] {
        assert_eq!(scores(&gpu, &logits, &targets, 0.8, chunk, padding), whole);
    }
    for row in 0..targets.len() {
        let alone =
            scores(&gpu, &logits[row * vocabulary..][..vocabulary], &targets[row..=row], 0.8, BLOCK, 0);
        assert_eq!(alone.logprobs, whole.logprobs[row..=row]);
        assert_eq!(alone.policy_logprobs, whole.policy_logprobs[row..=row]);
        assert_eq!(alone.entropies, whole.entropies[row..=row]);
    }
}

/// Gradient rows of one chunk.
fn gradient(
    gpu: &Gpu,
    dtype: Dtype,
    chunk: &[f32],
    first: usize,
    targets: &[u32],
    coefficients: &[f32],
    log_sums: &[f32],
    beta: f32,
) -> Vec<f32> {
    let (rows, width) = (targets.len(), chunk.len() / targets.len());
    let (chunk, out) = (gpu.floats(chunk), gpu.stored(dtype, &vec![f32::NAN; chunk.len()]));
    let (targets, coefficients) = (gpu.words(targets), gpu.floats(coefficients));
    let log_sums = gpu.floats(log_sums);
    gpu.launch(
        &format!("head_gradient_{}", suffix(dtype)),
        (rows, width.div_ceil(1024)),
        256,
        &[
            Arg::To(&chunk),
            Arg::Int(width),
            Arg::Int(width),
            Arg::Int(first),
            Arg::To(&targets),
            Arg::To(&coefficients),
            Arg::To(&log_sums),
            Arg::Float(beta),
            Arg::To(&out),
            Arg::Int(width),
        ],
    );
    out.stored(dtype)
}

#[test]
fn gradients_are_those_of_the_policy_log_probability() {
    let gpu = Gpu::new();
    let (vocabulary, beta) = (2501, 1.25_f32);
    let (logits, targets) = example(vocabulary);
    let coefficients = [0.5, -1.0, 0.0, 2.0, -0.25];
    let log_sums = scores(&gpu, &logits, &targets, beta, BLOCK, 0).log_sums;
    for dtype in FORMATS {
        for (first, width) in [(0, 1024), (1024, 1477)] {
            let chunk = cut(&logits, vocabulary, first, width, 0);
            let actual = gradient(&gpu, dtype, &chunk, first, &targets, &coefficients, &log_sums, beta);
            let mut expected = Vec::new();
            for row in 0..targets.len() {
                let logits = &logits[row * vocabulary..][..vocabulary];
                let exponent = |at: usize| f64::from(beta) * f64::from(logits[at]);
                let sum: f64 = (0..vocabulary).map(|at| exponent(at).exp()).sum();
                expected.extend((first..first + width).map(|at| {
                    let hit = f64::from(u8::from(at == targets[row] as usize));
                    (f64::from(coefficients[row]) * f64::from(beta) * (hit - exponent(at).exp() / sum)) as f32
                }));
            }
            assert_close(&actual, &expected, tolerance(dtype).max(1e-5));
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let gpu = Gpu::new();
    let (logits, targets, beta) = (values(2, 12), [7_u32], 0.7);
    let log_sums = scores(&gpu, &logits, &targets, beta, BLOCK, 0).log_sums;
    let actual = gradient(&gpu, Dtype::F32, &logits, 0, &targets, &[1.5], &log_sums, beta);
    crate::support::check_gradient(&logits, &actual, |logits| {
        1.5 * f64::from(scores(&gpu, logits, &targets, beta, BLOCK, 0).policy_logprobs[0])
    });
}
