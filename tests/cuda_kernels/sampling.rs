//! Draws of sampling.cu against `rollout::draw`.

use crate::cuda_emulator::device;
use crate::head::scores;
use crate::support::{assert_close, assert_refused, store, upload, values};
use rpt::cuda::sampling::{Drawn, LIVE, Replies, Rows, STOPPED, Settings, sample};
use rpt::cuda::{Device, Indices, Result};
use rpt::random::Stream;
use rpt::rollout::{Draw, Sampling, draw};

const WARM: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

/// Rows of logits and the replies that grow from them.
struct Batch<'a> {
    logits: &'a [f32],
    vocabulary: usize,
    sources: Option<Vec<u32>>,
    replies: Vec<u32>,
    streams: Vec<Stream>,
    lengths: Vec<u32>,
    finishes: Vec<u32>,
}

impl<'a> Batch<'a> {
    /// One reply for each row.
    fn new(logits: &'a [f32], vocabulary: usize, seed: u64) -> Self {
        let rows = logits.len() / vocabulary;
        Self {
            logits,
            vocabulary,
            sources: None,
            replies: (0..rows as u32).collect(),
            streams: (0..rows as u64).map(|row| Stream::new(seed, "test").child(row)).collect(),
            lengths: (0..rows as u32).map(|row| row * 3).collect(),
            finishes: vec![LIVE; rows],
        }
    }

    /// Draws into buffers of so many rows.
    fn try_draw(&self, device: &Device, sampling: &Sampling, rows: usize) -> Result<Drawn> {
        let indices = |values: &[u32]| Indices::upload(device, "rows", values).unwrap();
        let (logits, replies) = (store::<f32>(device, self.logits), indices(&self.replies));
        let sources = self.sources.as_deref().map(indices);
        let keys: Vec<u64> = self.streams.iter().copied().map(key_of).collect();
        let states = Replies {
            keys: upload(device, &keys),
            lengths: upload(device, &self.lengths),
            finishes: upload(device, &self.finishes),
        };
        let untouched = || upload(device, &vec![7.0; rows]);
        let mut drawn = Drawn {
            tokens: upload(device, &vec![u32::MAX; rows]),
            logprobs: untouched(),
            policy_logprobs: untouched(),
            sampling_logprobs: untouched(),
        };
        let rows = Rows {
            logits: (&logits).into(),
            vocabulary: self.vocabulary,
            sources: sources.as_ref().map(Indices::view),
            replies: replies.view(),
        };
        sample(device, &settings(sampling), rows, &states, &mut drawn)?;
        Ok(drawn)
    }

    fn draw(&self, device: &Device, sampling: &Sampling) -> Vec<Draw> {
        let drawn = self.try_draw(device, sampling, self.replies.len()).unwrap();
        let tokens = drawn.tokens.download().unwrap();
        let logprobs = drawn.logprobs.download().unwrap();
        let (policy, sampling) = (&drawn.policy_logprobs, &drawn.sampling_logprobs);
        let (policy, sampling) = (policy.download().unwrap(), sampling.download().unwrap());
        (0..tokens.len())
            .map(|row| Draw {
                token: tokens[row],
                logprob: logprobs[row],
                policy_logprob: policy[row],
                sampling_logprob: sampling[row],
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
                let uniform = self.streams[reply].uniform(u64::from(self.lengths[reply]));
                draw(logits, sampling, uniform)
            })
            .collect()
    }

    fn check(&self, device: &Device, sampling: &Sampling) {
        for (row, (actual, expected)) in
            self.draw(device, sampling).iter().zip(self.expected(sampling)).enumerate()
        {
            assert_eq!(actual.token, expected.token, "row {row} of {} with {sampling:?}", self.vocabulary);
            let logprobs = |draw: &Draw| [draw.logprob, draw.policy_logprob, draw.sampling_logprob];
            assert_close(&logprobs(actual), &logprobs(&expected), 1e-5);
        }
    }
}

fn settings(sampling: &Sampling) -> Settings {
    Settings {
        greedy: sampling.temperature <= 0.0,
        inverse_temperature: sampling.inverse_temperature(),
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
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
    let device = device();
    for (at, sampling) in truncations().into_iter().enumerate() {
        for vocabulary in [3, 100, 1500] {
            let logits = logits(at as u64, 3, vocabulary, 2.0);
            Batch::new(&logits, vocabulary, at as u64).check(&device, &sampling);
        }
    }
}

#[test]
fn ties_go_to_the_smaller_id() {
    let device = device();
    for (at, sampling) in truncations().into_iter().chain([Sampling::GREEDY, WARM]).enumerate() {
        let logits: Vec<f32> = logits(at as u64, 3, 300, 2.0).iter().map(|logit| logit.round()).collect();
        Batch::new(&logits, 300, at as u64).check(&device, &sampling);
        Batch::new(&[2.0; 300], 100, at as u64).check(&device, &sampling);
    }
}

#[test]
fn truncations_that_keep_most_of_a_large_vocabulary_agree_too() {
    let device = device();
    let vocabulary = 5003;
    let logits = logits(1, 2, vocabulary, 0.3);
    for sampling in [
        Sampling { top_p: 0.95, ..WARM },
        Sampling { top_k: 4000, ..WARM },
        Sampling { top_k: 4500, top_p: 0.9, min_p: 0.3, ..WARM },
        Sampling { min_p: 0.05, ..WARM },
        Sampling { top_k: 10_000, top_p: 0.5, ..WARM },
    ] {
        Batch::new(&logits, vocabulary, 3).check(&device, &sampling);
    }
}

#[test]
fn whole_distributions_and_the_most_probable_token_agree() {
    let device = device();
    for temperature in [0.0, 0.6, 1.0, 1.5] {
        for vocabulary in [1, 5, 1024, 1025, 3001] {
            let logits = logits(vocabulary as u64, 8, vocabulary, 2.0);
            Batch::new(&logits, vocabulary, 9).check(&device, &Sampling { temperature, ..WARM });
        }
    }
}

#[test]
fn uniform_numbers_are_those_of_the_stream() {
    let device = device();
    let (rows, vocabulary) = (30, 4096);
    let logits = vec![0.0; vocabulary];
    let batch = Batch {
        sources: Some(vec![0; rows]),
        replies: (0..rows as u32).rev().collect(),
        streams: (0..rows as u64).map(|row| Stream::new(5, "test").child(row)).collect(),
        lengths: (0..rows as u32).map(|row| row % 7).collect(),
        finishes: vec![LIVE; rows],
        ..Batch::new(&logits, vocabulary, 0)
    };
    for (draw, reply) in batch.draw(&device, &WARM).iter().zip((0..rows).rev()) {
        let uniform = batch.streams[reply].uniform(u64::from(batch.lengths[reply]));
        assert_eq!(draw.token, (uniform * vocabulary as f64) as u32);
    }
}

#[test]
fn a_row_draws_alone_what_it_draws_among_others() {
    let device = device();
    let (vocabulary, logits) = (1501, logits(4, 4, 1501, 2.0));
    let sampling = Sampling { temperature: 0.8, top_k: 50, top_p: 0.9, min_p: 0.0 };
    let all = Batch::new(&logits, vocabulary, 2).draw(&device, &sampling);
    for row in 0..4 {
        let batch =
            Batch { sources: Some(vec![row]), replies: vec![row], ..Batch::new(&logits, vocabulary, 2) };
        assert_eq!(batch.draw(&device, &sampling), all[row as usize..=row as usize]);
    }
}

#[test]
fn log_probabilities_have_the_bits_of_the_head() {
    let device = device();
    for temperature in [1.0, 0.7] {
        let (vocabulary, logits) = (2501, logits(6, 4, 2501, 2.0));
        let sampling = Sampling { temperature, top_k: 20, ..WARM };
        let draws = Batch::new(&logits, vocabulary, 2).draw(&device, &sampling);
        let tokens: Vec<u32> = draws.iter().map(|draw| draw.token).collect();
        let scores = scores(&device, &logits, &tokens, sampling.inverse_temperature());
        for (row, draw) in draws.iter().enumerate() {
            assert_eq!(draw.logprob.to_bits(), scores.logprobs[row].to_bits());
            assert_eq!(draw.policy_logprob.to_bits(), scores.policy_logprobs[row].to_bits());
        }
    }
}

#[test]
fn finished_replies_draw_nothing_and_rows_without_a_number_end() {
    let device = device();
    let logits: Vec<f32> = (0..200).map(|at| if at < 100 { f32::NAN } else { at as f32 * 0.01 }).collect();
    let batch = Batch { finishes: vec![LIVE, STOPPED], ..Batch::new(&logits, 100, 1) };
    for sampling in [WARM, Sampling::GREEDY, Sampling { top_k: 3, top_p: 0.5, min_p: 0.1, ..WARM }] {
        let draws = batch.draw(&device, &sampling);
        assert!(draws[0].token < 100 && draws[0].logprob.is_nan());
        let untouched = Draw { token: u32::MAX, logprob: 7.0, policy_logprob: 7.0, sampling_logprob: 7.0 };
        assert_eq!(draws[1], untouched);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let (logits, none) = (logits(1, 3, 10, 1.0), vec![]);
    let batch = || Batch::new(&logits, 10, 1);
    let refused = |batch: Batch, rows, what| assert_refused(batch.try_draw(&device, &WARM, rows), what);
    batch().try_draw(&device, &WARM, 3).unwrap();
    Batch { replies: vec![], ..Batch::new(&none, 10, 1) }.try_draw(&device, &WARM, 0).unwrap();
    refused(batch(), 2, "drawn tokens: 2 elements where 3 are");
    refused(Batch { vocabulary: 11, ..batch() }, 3, "rows of logits: 2 elements where 3 are");
    refused(Batch { sources: Some(vec![0, 1, 3]), ..batch() }, 3, "rows of logits: index 3");
    refused(Batch { sources: Some(vec![0, 1]), ..batch() }, 3, "sources of rows: 2");
    refused(Batch { replies: vec![0, 1, 3], ..batch() }, 3, "replies: index 3, where there are 3");
    refused(Batch { lengths: vec![0; 2], ..batch() }, 3, "replies: index 2, where there are 2");
    refused(Batch { finishes: vec![0; 2], ..batch() }, 3, "replies: index 2, where there are 2");
    for vocabulary in [0, (512 << 10) + 1] {
        refused(Batch { vocabulary, ..batch() }, 3, "of 1 to 524288");
    }
}
