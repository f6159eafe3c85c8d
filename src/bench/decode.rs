//! Sampling alone: tokens by second.

use super::workload::document;
use super::{engine, median, median_time, peak_rss_bytes};
use crate::error::Error;
use crate::model::{Decoder, Dtype, Products};
use crate::rollout::Prompt;
use crate::time::Time;
use crate::tokenize::Tokenizer;
use serde::Serialize;

/// What is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DecodeWork {
    /// Sequences that grow side by side.
    pub batch: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a sample.
    pub new_tokens: usize,
    /// All sequences are samples of one prompt; otherwise each has its own.
    pub shared: bool,
}

/// What it cost: medians over the rounds but the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeFigures {
    /// What was sampled.
    #[serde(flatten)]
    pub work: DecodeWork,
    /// Number format of the weights.
    pub dtype: Dtype,
    /// How products are computed.
    pub products: Products,
    /// Threads.
    pub threads: usize,
    /// Rounds that were measured.
    pub rounds: usize,
    /// Seconds before the first token.
    pub prefill: Time,
    /// Seconds after it.
    pub decode: Time,
    /// Prompt tokens by second of prefill; shared ones are counted once.
    pub prefill_tokens_per_second: f64,
    /// Sampled tokens by second of decoding.
    pub decode_tokens_per_second: f64,
    /// Sampled tokens by second of the whole.
    pub tokens_per_second: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// Measures `rounds` rounds, after one that is not counted.
///
/// # Errors
/// When prompts and samples do not fit the model's positions.
pub fn decode(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    work: DecodeWork,
    rounds: usize,
) -> Result<DecodeFigures, Error> {
    let prompts = prompts(work, tokenizer.vocab_size());
    let samples = if work.shared { work.batch } else { 1 };
    let round = |number: usize| -> Result<[Time; 2], Error> {
        let engine = engine(decoder, tokenizer, work.new_tokens, number);
        let (generation, time) = Time::of(|| engine.generate(&prompts, samples));
        let (prefill, decode) = generation?.seconds;
        Ok(time.split([prefill, decode]))
    };
    round(0)?;
    let times: Vec<[Time; 2]> = (1..=rounds).map(round).collect::<Result<_, _>>()?;
    let [prefill, decode] = [0, 1].map(|phase| median_time(times.iter().map(|times| times[phase])));
    let whole = median(times.iter().map(|[a, b]| a.wall_seconds + b.wall_seconds).collect());
    let (read, sampled) = ((prompts.len() * work.prompt) as f64, (work.batch * work.new_tokens) as f64);
    Ok(DecodeFigures {
        work,
        dtype: decoder.dtype(),
        products: decoder.products(),
        threads: rayon::current_num_threads(),
        rounds,
        prefill,
        decode,
        prefill_tokens_per_second: read / prefill.wall_seconds,
        decode_tokens_per_second: sampled / decode.wall_seconds,
        tokens_per_second: sampled / whole,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

fn prompts(work: DecodeWork, vocabulary: usize) -> Vec<Prompt> {
    let prompt = |number: usize| Prompt {
        ordinal: number as u64,
        trunk: document(number as u64, work.prompt, vocabulary),
        length: work.prompt,
        header: 0,
        footer: [].into(),
        cuts: [].into(),
    };
    (0..if work.shared { 1 } else { work.batch }).map(prompt).collect()
}
