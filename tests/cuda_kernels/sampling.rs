//! sampling.cu against `rollout::draw`.

use crate::head::scores;
use crate::support::{Arg, Gpu, assert_close, values};
use rpt::random::Stream;
use rpt::rollout::{Draw, Sampling, draw};

const WARM: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

/// Rows of logits and the replies that grow from them.
struct Batch<'a> {
    logits: &'a [f32],
    vocabulary: usize,
    sources: Option<Vec<i32>>,
    replies: Vec<i32>,
    streams: Vec<Stream>,
    lengths: Vec<i32>,
    finishes: Vec<i32>,
}

impl<'a> Batch<'a> {
    /// One reply for each row.
    fn new(logits: &'a [f32], vocabulary: usize, seed: u64) -> Self {
        let rows = logits.len() / vocabulary;
        Self {
            logits,
            vocabulary,
            sources: None,
            replies: (0..rows as i32).collect(),
            streams: (0..rows as u64).map(|row| Stream::new(seed, "test").child(row)).collect(),
            lengths: (0..rows as i32).map(|row| row * 3).collect(),
            finishes: vec![0; rows],
        }
    }

    fn draw(&self, gpu: &Gpu, sampling: &Sampling) -> Vec<Draw> {
        let rows = self.replies.len();
        let (logits, replies) = (gpu.floats(self.logits), gpu.ints(&self.replies));
        let sources = self.sources.as_ref().map(|sources| gpu.ints(sources));
        let keys: Vec<u64> = self.streams.iter().copied().map(key_of).collect();
        let (keys, lengths) = (gpu.longs(&keys), gpu.ints(&self.lengths));
        let finishes = gpu.ints(&self.finishes);
        let tokens = gpu.words(&vec![u32::MAX; rows]);
        let outputs: Vec<_> = (0..3).map(|_| gpu.floats(&vec![7.0; rows])).collect();
        gpu.launch(
            "sample_tokens",
            (rows, 1),
            512,
            &[
                Arg::To(&logits),
                Arg::optional(sources.as_ref()),
                Arg::Int(self.vocabulary),
                Arg::To(&replies),
                Arg::To(&keys),
                Arg::To(&lengths),
                Arg::To(&finishes),
                Arg::Int(usize::from(sampling.temperature <= 0.0)),
                Arg::Float(sampling.inverse_temperature()),
                Arg::Int(sampling.top_k),
                Arg::Float(sampling.top_p),
                Arg::Float(sampling.min_p),
                Arg::To(&tokens),
                Arg::To(&outputs[0]),
                Arg::To(&outputs[1]),
                Arg::To(&outputs[2]),
            ],
        );
        let [logprobs, policy, drawn] = [0, 1, 2].map(|at| outputs[at].floats());
        let tokens = tokens.words();
        (0..rows)
            .map(|row| Draw {
                token: tokens[row],
                logprob: logprobs[row],
                policy_logprob: policy[row],
                sampling_logprob: drawn[row],
            })
            .collect()
    }

    /// What the CPU draws for each row.
    fn expected(&self, sampling: &Sampling) -> Vec<Draw> {
        (0..self.replies.len())
            .map(|row| {
                let reply = self.replies[row] as usize;
                let source = self.sources.as_ref().map_or(row, |sources| sources[row] as usize);
                let logits = &self.logits[source * self.vocabulary..][..self.vocabulary];
                let uniform = self.streams[reply].uniform(self.lengths[reply] as u64);
                draw(logits, sampling, uniform, &mut Vec::new())
            })
            .collect()
    }

    fn check(&self, gpu: &Gpu, sampling: &Sampling) {
        for (row, (actual, expected)) in
            self.draw(gpu, sampling).iter().zip(self.expected(sampling)).enumerate()
        {
            assert_eq!(actual.token, expected.token, "row {row} of {} with {sampling:?}", self.vocabulary);
            let logprobs = |draw: &Draw| [draw.logprob, draw.policy_logprob, draw.sampling_logprob];
            assert_close(&logprobs(actual), &logprobs(&expected), 1e-5);
        }
    }
}

/// The key of a stream, which its debugging output alone shows.
fn key_of(stream: Stream) -> u64 {
    format!("{stream:?}").chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn logits(seed: u64, rows: usize, vocabulary: usize, spread: f32) -> Vec<f32> {
    values(seed, rows * vocabulary).iter().map(|value| value * spread + 5.0).collect()
}

/// Every combination of some truncations.
fn truncations() -> Vec<Sampling> {
    let mut all = Vec::new();
    for top_k in [0, 1, 5, 40] {
        for top_p in [1.0, 0.9, 0.3, 1e-6] {
            for min_p in [0.0, 0.02, 1.0] {
                let temperature = if top_k == 5 { 0.7 } else { 1.0 };
                all.push(Sampling { temperature, top_k, top_p, min_p });
            }
        }
    }
    all
}

#[test]
fn truncated_draws_are_those_of_the_cpu() {
    let gpu = Gpu::new();
    for (at, sampling) in truncations().into_iter().enumerate() {
        for vocabulary in [3, 100, 1500] {
            let logits = logits(at as u64, 3, vocabulary, 2.0);
            Batch::new(&logits, vocabulary, at as u64).check(&gpu, &sampling);
        }
    }
}

#[test]
fn ties_go_to_the_smaller_id() {
    let gpu = Gpu::new();
    for (at, sampling) in truncations().into_iter().chain([Sampling::GREEDY, WARM]).enumerate() {
        let logits: Vec<f32> = logits(at as u64, 3, 300, 2.0).iter().map(|logit| logit.round()).collect();
        Batch::new(&logits, 300, at as u64).check(&gpu, &sampling);
        Batch::new(&[2.0; 300], 100, at as u64).check(&gpu, &sampling);
    }
}

#[test]
fn truncations_that_keep_most_of_a_large_vocabulary_agree_too() {
    let gpu = Gpu::new();
    let vocabulary = 5003;
    let logits = logits(1, 2, vocabulary, 0.3);
    for sampling in [
        Sampling { top_p: 0.95, ..WARM },
        Sampling { top_k: 4000, ..WARM },
        Sampling { top_k: 4500, top_p: 0.9, min_p: 0.3, ..WARM },
        Sampling { min_p: 0.05, ..WARM },
        Sampling { top_k: 10_000, top_p: 0.5, ..WARM },
    ] {
        Batch::new(&logits, vocabulary, 3).check(&gpu, &sampling);
    }
}

#[test]
fn whole_distributions_and_the_most_probable_token_agree() {
    let gpu = Gpu::new();
    for temperature in [0.0, 0.6, 1.0, 1.5] {
        for vocabulary in [1, 5, 1024, 1025, 3001] {
            let logits = logits(vocabulary as u64, 8, vocabulary, 2.0);
            Batch::new(&logits, vocabulary, 9).check(&gpu, &Sampling { temperature, ..WARM });
        }
    }
}

#[test]
fn uniform_numbers_are_those_of_the_stream() {
    let gpu = Gpu::new();
    let (rows, vocabulary) = (30, 4096);
    let logits = vec![0.0; vocabulary];
    let batch = Batch {
        sources: Some(vec![0; rows]),
        replies: (0..rows as i32).rev().collect(),
        streams: (0..rows as u64).map(|row| Stream::new(5, "test").child(row)).collect(),
        lengths: (0..rows as i32).map(|row| row % 7).collect(),
        finishes: vec![0; rows],
        ..Batch::new(&logits, vocabulary, 0)
    };
    for (draw, reply) in batch.draw(&gpu, &WARM).iter().zip((0..rows).rev()) {
        let uniform = batch.streams[reply].uniform(batch.lengths[reply] as u64);
        assert_eq!(draw.token, (uniform * vocabulary as f64) as u32);
    }
}

#[test]
fn a_row_draws_alone_what_it_draws_among_others() {
    let gpu = Gpu::new();
    let (vocabulary, logits) = (1501, logits(4, 4, 1501, 2.0));
    let sampling = Sampling { temperature: 0.8, top_k: 50, top_p: 0.9, min_p: 0.0 };
    let all = Batch::new(&logits, vocabulary, 2).draw(&gpu, &sampling);
    for row in 0..4 {
        let batch =
            Batch { sources: Some(vec![row]), replies: vec![row], ..Batch::new(&logits, vocabulary, 2) };
        assert_eq!(batch.draw(&gpu, &sampling), all[row as usize..=row as usize]);
    }
}

#[test]
fn log_probabilities_have_the_bits_of_the_head() {
    let gpu = Gpu::new();
    for temperature in [1.0, 0.7] {
        let (vocabulary, logits) = (2501, logits(6, 4, 2501, 2.0));
        let sampling = Sampling { temperature, top_k: 20, ..WARM };
        let draws = Batch::new(&logits, vocabulary, 2).draw(&gpu, &sampling);
        let tokens: Vec<u32> = draws.iter().map(|draw| draw.token).collect();
        let scores = scores(&gpu, &logits, &tokens, sampling.inverse_temperature(), 1024, 0);
        for (row, draw) in draws.iter().enumerate() {
            assert_eq!(draw.logprob.to_bits(), scores.logprobs[row].to_bits());
            assert_eq!(draw.policy_logprob.to_bits(), scores.policy_logprobs[row].to_bits());
        }
    }
}

#[test]
fn finished_replies_draw_nothing_and_rows_without_a_number_end() {
    let gpu = Gpu::new();
    let logits: Vec<f32> = (0..200).map(|at| if at < 100 { f32::NAN } else { at as f32 * 0.01 }).collect();
    let batch = Batch { finishes: vec![0, 2], ..Batch::new(&logits, 100, 1) };
    for sampling in [WARM, Sampling::GREEDY, Sampling { top_k: 3, top_p: 0.5, min_p: 0.1, ..WARM }] {
        let draws = batch.draw(&gpu, &sampling);
        assert!(draws[0].token < 100 && draws[0].logprob.is_nan());
        let untouched = Draw { token: u32::MAX, logprob: 7.0, policy_logprob: 7.0, sampling_logprob: 7.0 };
        assert_eq!(draws[1], untouched);
    }
}
