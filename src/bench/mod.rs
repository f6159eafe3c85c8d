//! Measurements of what runs cost on a machine: of a whole step, of sampling, of training, of products.
//!
//! Each repeats its work, leaves the first round out and reports medians. Operations are counted from
//! shapes, as the ledger of a run counts them; the peak is what the matrix product itself reaches here.

mod decode;
#[cfg(feature = "cuda")]
mod device;
mod matmul;
mod step;
mod train;
mod workload;

pub use decode::{DecodeFigures, DecodeWork, decode};
#[cfg(feature = "cuda")]
pub use device::copy_bandwidth;
pub use matmul::{MatmulFigures, matmul, peak};
pub use step::{StepFigures, step};
pub use train::{TrainFigures, TrainWork, train};
pub use workload::Workload;

use crate::config::CacheFormat;
use crate::model::Decoder;
use crate::rollout::{Engine, Sampling, StopRule};
use crate::time::Time;
use crate::tokenize::Tokenizer;

/// Samples at temperature 1, to the full length; the number of the round is the seed.
fn engine<'a>(
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    max_new_tokens: usize,
    round: usize,
) -> Engine<'a> {
    Engine {
        decoder,
        sampling: Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
        stop: StopRule { eos: Vec::new(), strings: &[], tokenizer, max_new_tokens },
        seed: round as u64,
        policy_version: 0,
        kv_cache: CacheFormat::Model,
        cache_bytes: None,
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn median_time(times: impl Iterator<Item = Time> + Clone) -> Time {
    Time {
        wall_seconds: median(times.clone().map(|time| time.wall_seconds).collect()),
        cpu_seconds: median(times.map(|time| time.cpu_seconds).collect()),
    }
}

/// The largest part of the process that was ever in memory, where the system tells.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }
}
