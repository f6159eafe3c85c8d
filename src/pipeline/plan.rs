//! What a run would do, without doing it.

use super::materials::check_lengths;
use super::remote::{Commits, Scope, localize};
use crate::config::{CacheFormat, Loaded, OptimizerConfig, Pipeline, PolicyRecipe};
use crate::error::Error;
use crate::model::{DecoderConfig, DeviceName, Layout};
use crate::report::Log;
use crate::train::Trainer;
use serde::Serialize;
use std::fmt;

/// Stages and derived sizes of a pipeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Name of the run.
    pub name: String,
    /// Stages in order, with what each does.
    pub stages: Vec<(String, String)>,
    /// Parameters of the model.
    pub parameters: usize,
    /// What training holds in memory, and where.
    pub memory: Vec<Held>,
    /// Rollouts of one step.
    pub rollouts_per_step: usize,
    /// Largest number of sampled tokens of one step.
    pub max_sampled_tokens_per_step: usize,
    /// What the algorithm's name and its overrides resolve to.
    pub recipe: Option<PolicyRecipe>,
}

/// Bytes of one kind that training holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    /// What they are.
    pub what: &'static str,
    /// Bytes in the machine's memory.
    pub machine_bytes: u64,
    /// Bytes in the memory of the device, if the model is on one.
    pub device_bytes: u64,
}

/// Plans a run: resolves and validates, and touches nothing. Of a model on the Hub the configuration alone
/// is fetched into the cache.
///
/// # Errors
/// When the model's configuration cannot be read.
pub fn plan(loaded: &Loaded) -> Result<Plan, Error> {
    let local = localize(&loaded.pipeline, Scope::Shape, Commits::new(), &Log::without_file(), None)?;
    let pipeline = &local.pipeline;
    let config = match (&pipeline.model.path, &pipeline.model.scratch) {
        (Some(path), _) => Some(DecoderConfig::load(path)?),
        (None, Some(scratch)) => {
            let vocabulary = match (&pipeline.tokenizer.train, &pipeline.tokenizer.path) {
                (Some(training), _) => training.vocab_size,
                (None, Some(path)) => crate::tokenize::Tokenizer::load(path)?.vocab_size(),
                (None, None) => 0,
            };
            Some(DecoderConfig::from_scratch(scratch, vocabulary))
        }
        (None, None) => None,
    };
    if let Some(config) = &config {
        check_lengths(pipeline, config, 0)?;
    }
    let parameters = config.as_ref().map_or(0, |config| Layout::new(config).len());
    let train = pipeline.train.as_ref();
    let rollouts = train.map_or(0, |train| train.tasks_per_step * pipeline.rollout.samples_per_task);
    Ok(Plan {
        name: loaded.name.clone(),
        stages: stages(loaded),
        parameters,
        memory: config.map_or(Vec::new(), |config| memory(pipeline, &config)),
        rollouts_per_step: rollouts,
        max_sampled_tokens_per_step: rollouts * pipeline.rollout.max_new_tokens,
        recipe: train.map(crate::config::TrainConfig::recipe),
    })
}

/// What training holds at most, in the order of what cannot be done without.
fn memory(pipeline: &Pipeline, config: &DecoderConfig) -> Vec<Held> {
    let layout = Layout::new(config);
    let (count, dtype) = (layout.len() as u64, pipeline.model.dtype.unwrap_or_default());
    let weights = count * dtype.bytes() as u64;
    let optimizers = || {
        let pretrain = pipeline.pretrain.iter().map(|stage| &stage.optimizer);
        let cold_start = pipeline.cold_start.iter().map(|stage| &stage.optimizer);
        pretrain.chain(cold_start).chain(pipeline.train.iter().map(|stage| &stage.optimizer))
    };
    let average = |optimizer: &OptimizerConfig| if optimizer.ema_decay > 0.0 { 4 } else { 0 };
    let largest_average = optimizers().map(average).max().unwrap_or(0);
    let averaged = largest_average > 0;
    let held = |what, machine_bytes, device_bytes| Held { what, machine_bytes, device_bytes };
    let tokens = pipeline.run.tokens_per_micro_batch as u64;
    let inputs = tokens * (4 * config.layers * config.hidden_size) as u64;
    if pipeline.model.device == DeviceName::Cpu {
        // An adapter stands on a copy of the weights, and is small beside them.
        let (copies, trained) = if pipeline.model.lora.is_some() { (2, 0) } else { (1, count) };
        let gradients = 4 * trained * Trainer::gradient_buffers(layout.len()) as u64;
        return vec![
            held("weights", copies * weights, 0),
            held("parameters", 4 * trained, 0),
            held(
                if averaged { "moments and average" } else { "moments" },
                (8 + largest_average) * trained,
                0,
            ),
            held("gradients", gradients, 0),
            held("activations, if layers are computed again", inputs, 0),
            held("keys and values of 1,000 tokens", 1000 * config.cached_bytes(size_of::<f32>()) as u64, 0),
        ];
    }
    let bytes = |optimizer| count * (4 + average(optimizer) + 2 * optimizer.moments.bytes() as u64);
    // Stages follow one another: each place must have room for the one that takes most of it.
    let most = |offload| optimizers().filter(|one| one.offload == offload).map(bytes).max().unwrap_or(0);
    let (here, there) = (most(true), most(false));
    let tape = tokens * config.device_tape_bytes(dtype.bytes()) as u64;
    let cached = match pipeline.rollout.kv_cache {
        CacheFormat::Model => dtype.bytes(),
        CacheFormat::Fp8 => 1,
    };
    vec![
        held("weights", weights, weights),
        held("gradients", 0, 4 * count),
        held(
            if averaged { "parameters, moments and average" } else { "parameters and moments" },
            here,
            there,
        ),
        held("activations of a micro-batch", 0, tape),
        held("activations, if layers are computed again", 0, inputs),
        held("keys and values of 1,000 tokens", 0, 1000 * config.cached_bytes(cached) as u64),
    ]
}

fn stages(loaded: &Loaded) -> Vec<(String, String)> {
    let pipeline = &loaded.pipeline;
    let mut stages = vec![("corpus".to_string(), pipeline.corpus.place())];
    let mut add = |name: &str, what: String| stages.push((name.into(), what));
    if let Some(training) = &pipeline.tokenizer.train {
        add("tokenizer", format!("byte-level BPE of {} ids", training.vocab_size));
    }
    if let Some(pretrain) = &pipeline.pretrain {
        add("pretrain", format!("{} steps of {} documents", pretrain.steps, pretrain.documents_per_step));
    }
    let tasks = &pipeline.tasks;
    add(
        "tasks",
        format!(
            "{:?} selection, entropy {} to {} nats",
            tasks.selection, tasks.min_entropy, tasks.max_entropy
        ),
    );
    if let Some(cold_start) = &pipeline.cold_start {
        add("cold_start", format!("{} steps of {} traces", cold_start.steps, cold_start.traces_per_step));
    }
    if let Some(train) = &pipeline.train {
        let samples = pipeline.rollout.samples_per_task;
        add("train", format!("{} steps of {} tasks x {samples} rollouts", train.steps, train.tasks_per_step));
    }
    for (on, name) in [
        (pipeline.controls.continued_ntp, "continued_ntp"),
        (pipeline.controls.more_cold_start, "more_cold_start"),
        (pipeline.controls.clean_traces, "clean_traces"),
    ] {
        if on {
            add(name, "control, for the same counted compute".into());
        }
    }
    if pipeline.eval.is_some() {
        add("eval", "plain and reasoned accuracy on held-out positions".into());
    }
    add("report", "summary.json and report.html".into());
    stages
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "run {}", self.name)?;
        for (name, what) in &self.stages {
            writeln!(f, "  {name:<16} {what}")?;
        }
        writeln!(f, "parameters        {}", self.parameters)?;
        let on_device = self.memory.iter().any(|held| held.device_bytes > 0);
        writeln!(
            f,
            "memory{}",
            if on_device { format!("{:>55}{:>14}", "machine", "device") } else { String::new() }
        )?;
        for Held { what, machine_bytes, device_bytes } in &self.memory {
            write!(f, "  {what:<44} {:>14}", binary(*machine_bytes))?;
            writeln!(
                f,
                "{}",
                if on_device { format!("{:>14}", binary(*device_bytes)) } else { String::new() }
            )?;
        }
        write!(
            f,
            "rollouts per step {} (at most {} tokens)",
            self.rollouts_per_step, self.max_sampled_tokens_per_step
        )
    }
}

/// A number of bytes for people.
fn binary(bytes: u64) -> String {
    match bytes {
        0 => "-".into(),
        1..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}
