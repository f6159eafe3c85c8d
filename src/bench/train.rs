//! Plain next-token training alone.

use super::workload::document;
use super::{median, median_time, peak, peak_rss_bytes};
use crate::config::{OptimizerConfig, RunConfig, TrainConfig};
use crate::error::Error;
use crate::model::{Decoder, Dtype, Products};
use crate::time::Time;
use crate::train::loss::PolicyLoss;
use crate::train::{Example, Trainer, UpdateStats, supervised_batches};
use serde::Serialize;

/// What is trained on in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainWork {
    /// Documents.
    pub documents: usize,
    /// Tokens of each.
    pub length: usize,
}

/// What a step cost: medians over the steps but the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainFigures {
    /// What was trained on.
    #[serde(flatten)]
    pub work: TrainWork,
    /// Number format of the weights.
    pub dtype: Dtype,
    /// How products are computed.
    pub products: Products,
    /// Threads.
    pub threads: usize,
    /// Steps that were measured.
    pub steps: usize,
    /// Seconds of a step.
    pub wall_seconds_per_step: f64,
    /// Seconds of a step on all cores together.
    pub cpu_seconds_per_step: f64,
    /// Of the forward pass.
    pub forward: Time,
    /// Of the backward pass.
    pub backward: Time,
    /// Of the optimiser, the weights' rounding and packing included.
    pub optimizer: Time,
    /// Tokens by second.
    pub tokens_per_second: f64,
    /// Floating-point operations by second, in units of 10^9.
    pub gflops: f64,
    /// What the matrix product alone reaches with all threads.
    pub matmul_gflops: f64,
    /// The part of that.
    pub share_of_peak: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// Measures `steps` steps, after one that is not counted.
///
/// # Errors
/// When documents do not fit the model's positions, or an update fails.
pub fn train(decoder: Decoder, work: TrainWork, steps: usize) -> Result<TrainFigures, Error> {
    let (dtype, products, vocabulary) = (decoder.dtype(), decoder.products(), decoder.config().vocab_size);
    let matmul_gflops = peak(&decoder)?;
    let config = OptimizerConfig { learning_rate: 1e-6, ..OptimizerConfig::default() };
    let mut trainer = Trainer::new(decoder, &config, steps as u64 + 1)?;
    let mut one_step = |number: usize| -> Result<(UpdateStats, Time), Error> {
        let example = |document: usize| Example {
            ids: self::document((number * work.documents + document) as u64, work.length, vocabulary)
                .to_vec(),
            first_target: 1,
            weight: 1.0,
        };
        let examples: Vec<Example> = (0..work.documents).map(example).collect();
        let (stats, time) = Time::of(|| {
            let batches = supervised_batches(&[examples], RunConfig::default().tokens_per_micro_batch);
            trainer.update(&batches, &PolicyLoss::new(&TrainConfig::default()), 1.0, None)
        });
        Ok((stats?, time))
    };
    one_step(0)?;
    let measured: Vec<_> = (1..=steps).map(one_step).collect::<Result<_, _>>()?;
    let time = median_time(measured.iter().map(|(_, time)| *time));
    let flops = median(measured.iter().map(|(stats, _)| stats.totals.flops as f64).collect());
    let gflops = flops * 1e-9 / time.wall_seconds;
    Ok(TrainFigures {
        work,
        dtype,
        products,
        threads: rayon::current_num_threads(),
        steps,
        wall_seconds_per_step: time.wall_seconds,
        cpu_seconds_per_step: time.cpu_seconds,
        forward: median_time(measured.iter().map(|(stats, _)| stats.times.forward)),
        backward: median_time(measured.iter().map(|(stats, _)| stats.times.backward)),
        optimizer: median_time(measured.iter().map(|(stats, _)| stats.times.optimizer)),
        tokens_per_second: (work.documents * work.length) as f64 / time.wall_seconds,
        gflops,
        matmul_gflops,
        share_of_peak: gflops / matmul_gflops,
        peak_rss_bytes: peak_rss_bytes(),
    })
}
