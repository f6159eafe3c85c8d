//! A whole step: sampling, reward, advantages, update.

use super::workload::Workload;
use super::{engine, median, median_time, peak, peak_rss_bytes};
use crate::config::{AdvantageScale, LossMean, OptimizerConfig, TrainConfig};
use crate::error::Error;
use crate::model::{Decoder, Dtype, Products};
use crate::rollout::{Generation, Prompt, Rollout};
use crate::time::Time;
use crate::tokenize::Tokenizer;
use crate::train::advantage::advantages;
use crate::train::loss::PolicyLoss;
use crate::train::{ScoredGroup, Trainer, policy_batches};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a step cost: medians over the steps but the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepFigures {
    /// The workload.
    pub workload: String,
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
    /// Both by phase: prefill, decode, forward, backward, optimizer, other.
    pub phases: BTreeMap<&'static str, Time>,
    /// Tokens of a step that were computed, in sampling: shared prompts once.
    pub unique_tokens: u64,
    /// The same where nothing is shared.
    pub repeated_tokens: u64,
    /// Floating-point operations of a step, counted from shapes, in units of 10^9.
    pub gflop_per_step: f64,
    /// The same by second.
    pub gflops: f64,
    /// What the matrix product alone reaches with all threads.
    pub matmul_gflops: f64,
    /// The part of that.
    pub share_of_peak: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// One step.
struct Measured {
    time: Time,
    phases: [(&'static str, Time); 6],
    unique_tokens: u64,
    flops: u64,
}

/// Measures `steps` steps of a workload, after one that is not counted.
///
/// Samples have exactly T tokens; the reward is 1 for an even last token, else 0; GRPO's advantages, a mean
/// over all tokens, one update of `AdamW`.
///
/// # Errors
/// When prompts and samples do not fit the model's positions, or an update fails.
pub fn step(
    decoder: Decoder,
    tokenizer: &Tokenizer,
    workload: Workload,
    steps: usize,
) -> Result<StepFigures, Error> {
    let matmul_gflops = peak(&decoder)?;
    let (dtype, products) = (decoder.dtype(), decoder.products());
    let config = OptimizerConfig { learning_rate: 1e-6, max_grad_norm: 1.0, ..OptimizerConfig::default() };
    let mut trainer = Trainer::new(decoder, &config, steps as u64 + 1)?;
    one_step(&mut trainer, tokenizer, workload, 0)?;
    let measured: Vec<Measured> = (1..=steps)
        .map(|number| one_step(&mut trainer, tokenizer, workload, number))
        .collect::<Result<_, _>>()?;
    let time = median_time(measured.iter().map(|step| step.time));
    let phase =
        |at: usize| (measured[0].phases[at].0, median_time(measured.iter().map(|step| step.phases[at].1)));
    let gflop_per_step = median(measured.iter().map(|step| step.flops as f64 * 1e-9).collect());
    let gflops = gflop_per_step / time.wall_seconds;
    let sampled = (workload.documents * workload.positions * workload.samples * workload.new_tokens) as u64;
    Ok(StepFigures {
        workload: workload.to_string(),
        dtype,
        products,
        threads: rayon::current_num_threads(),
        steps,
        wall_seconds_per_step: time.wall_seconds,
        cpu_seconds_per_step: time.cpu_seconds,
        phases: (0..6).map(phase).collect(),
        unique_tokens: measured[0].unique_tokens,
        repeated_tokens: workload.repeated_prompt_tokens() + sampled,
        gflop_per_step,
        gflops,
        matmul_gflops,
        share_of_peak: gflops / matmul_gflops,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

fn one_step(
    trainer: &mut Trainer,
    tokenizer: &Tokenizer,
    workload: Workload,
    number: usize,
) -> Result<Measured, Error> {
    let prompts = workload.prompts(number, tokenizer.vocab_size());
    let (done, time) = Time::of(|| -> Result<_, Error> {
        let engine = engine(trainer.decoder(), tokenizer, workload.new_tokens, number);
        let (generation, sampling) = Time::of(|| engine.generate(&prompts, workload.samples));
        let generation = generation?;
        let stats = update(trainer, workload, &prompts, &generation)?;
        let [prefill, decode] = sampling.split([generation.seconds.0, generation.seconds.1]);
        Ok((prefill, decode, generation, stats))
    });
    let (prefill, decode, generation, stats) = done?;
    let times = stats.times;
    let known = [prefill, decode, times.forward, times.backward, times.optimizer].into_iter().sum();
    Ok(Measured {
        time,
        phases: [
            ("prefill", prefill),
            ("decode", decode),
            ("forward", times.forward),
            ("backward", times.backward),
            ("optimizer", times.optimizer),
            ("other", time - known),
        ],
        unique_tokens: generation.unique_prompt_tokens + generation.sampled_tokens,
        flops: generation.flops + stats.totals.flops,
    })
}

fn update(
    trainer: &mut Trainer,
    workload: Workload,
    prompts: &[Prompt],
    generation: &Generation,
) -> Result<crate::train::UpdateStats, Error> {
    fn scored<'a>((prompt, rollouts): (&'a Prompt, &'a Vec<Rollout>)) -> ScoredGroup<'a> {
        let reward = |rollout: &Rollout| f32::from(rollout.tokens.last().is_some_and(|token| token % 2 == 0));
        let rewards: Vec<f32> = rollouts.iter().map(reward).collect();
        ScoredGroup { prompt, rollouts, advantages: advantages(&rewards, AdvantageScale::Std) }
    }
    let groups: Vec<ScoredGroup> = prompts.iter().zip(&generation.groups).map(scored).collect();
    let tokens = crate::config::RunConfig::default().tokens_per_micro_batch;
    let batches = policy_batches(&groups, LossMean::Token, workload.new_tokens, 0.0, tokens);
    Ok(trainer.update(&batches, &PolicyLoss::new(&TrainConfig::default()), 1.0, None)?)
}
