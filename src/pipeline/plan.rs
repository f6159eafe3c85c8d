//! What a run would do, without doing it.

use super::materials::check_lengths;
use super::remote::{Commits, Scope, localize};
use crate::config::{Loaded, Pipeline, PolicyRecipe};
use crate::error::Error;
use crate::model::{DecoderConfig, Layout};
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
    /// Most bytes of weights, gradients and AdamW moments; activations come on top.
    pub training_bytes: usize,
    /// Rollouts of one step.
    pub rollouts_per_step: usize,
    /// Largest number of sampled tokens of one step.
    pub max_sampled_tokens_per_step: usize,
    /// What the algorithm's name and its overrides resolve to.
    pub recipe: Option<PolicyRecipe>,
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
    let parameters = config.map_or(0, |config| Layout::new(&config).len());
    let train = pipeline.train.as_ref();
    let rollouts = train.map_or(0, |train| train.tasks_per_step * pipeline.rollout.samples_per_task);
    Ok(Plan {
        name: loaded.name.clone(),
        stages: stages(loaded),
        parameters,
        training_bytes: training_bytes(pipeline, parameters),
        rollouts_per_step: rollouts,
        max_sampled_tokens_per_step: rollouts * pipeline.rollout.max_new_tokens,
        recipe: train.map(crate::config::TrainConfig::recipe),
    })
}

/// The weights in their format (twice for an adapter, which stands on a copy); and in full precision,
/// for whatever is trained, the parameters, two moments and the gradient buffers.
fn training_bytes(pipeline: &Pipeline, parameters: usize) -> usize {
    let weights = parameters * pipeline.model.dtype.unwrap_or_default().bytes();
    match &pipeline.model.lora {
        Some(_) => 2 * weights,
        None => weights + 4 * parameters * (3 + Trainer::gradient_buffers(parameters)),
    }
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
        writeln!(
            f,
            "weights, gradients and moments: at most {:.1} MiB",
            self.training_bytes as f64 / 1_048_576.0
        )?;
        write!(
            f,
            "rollouts per step {} (at most {} tokens)",
            self.rollouts_per_step, self.max_sampled_tokens_per_step
        )
    }
}
