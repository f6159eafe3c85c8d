//! A run from corpus to report: the stages in order, what is done and what is left.
//!
//! corpus and tokenizer, pre-training, tasks, cold start, reinforcement, controls, evaluation,
//! report. Every stage leaves its result in the run directory and is passed over when it is there;
//! a training stage goes on from its newest checkpoint. Running the same command again is the
//! whole recovery story.

mod controls;
mod directory;
mod duplicates;
mod error;
mod evaluate;
mod export;
mod health;
mod materials;
mod plan;
mod prepare;
mod reinforce;
mod remote;
mod run;
mod scorers;
mod stage;
mod summary;
mod supervised;

pub use directory::{RunDirectory, RunModel, VerifyReport};
pub use error::PipelineError;
pub use export::ExportOptions;
pub use plan::{Plan, plan};
pub use prepare::{Share, ShareOutcome, prepare_share};
pub use run::{Paths, Run};

use crate::config::{ColdStartConfig, Loaded};
use crate::corpus::Cursor;
use crate::error::Error;
use crate::model::Decoder;
use controls::evaluate_all;
use materials::{initial_decoder, max_positions};
use prepare::{build_tasks, scores_with_base};
use reinforce::{ReinforceState, reinforce};
use stage::{Finished, StageState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use supervised::{CorpusExamples, SupervisedStage, TraceExamples, run_supervised};

/// How far a run goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Until {
    /// Task shards are written.
    Tasks,
    /// The reinforcement stage is done.
    Train,
    /// Everything, evaluation and report included.
    End,
}

/// Options of a run that do not change its result.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run directory; default: `runs/<name>`.
    pub out: Option<PathBuf>,
    /// How far to go.
    pub until: Until,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// Everything that was asked for is done.
    Finished(PathBuf),
    /// It was done before; nothing was touched.
    AlreadyFinished(PathBuf),
}

/// What the training stages left.
struct Trained {
    base: Decoder,
    pretrain: Option<StageState<Cursor>>,
    cold_start: Option<Finished<Cursor>>,
    train: Option<Finished<ReinforceState>>,
}

/// Runs a pipeline to its end, from wherever it stands.
///
/// # Errors
/// When something is wrong that a user must mend, or a signal asked for a stop.
pub fn run(loaded: &Loaded, options: &RunOptions, interrupt: &Arc<AtomicBool>) -> Result<RunOutcome, Error> {
    let directory = options.out.clone().unwrap_or_else(|| Path::new("runs").join(&loaded.name));
    if summary::is_finished(loaded, &directory)? {
        return Ok(RunOutcome::AlreadyFinished(directory));
    }
    let run = Run::open(loaded, directory.clone(), interrupt)?;
    if options.until == Until::Tasks && !scores_with_base(&run) {
        build_tasks(&run, "train", None)?;
        return Ok(RunOutcome::Finished(directory));
    }
    let (base, pretrain) = pretrain(&run)?;
    build_tasks(&run, "train", Some(&base))?;
    if options.until == Until::Tasks {
        return Ok(RunOutcome::Finished(directory));
    }
    let mut trained = Trained { base, pretrain, cold_start: None, train: None };
    trained.cold_start = cold_start(&run, &trained)?;
    build_tasks(&run, "eval", Some(&trained.base))?;
    if let Some(config) = &run.pipeline.train {
        let start = || Ok((trained.start_of_train().clone(), trained.metrics_bytes()));
        let reference = || Ok(trained.start_of_train().clone());
        trained.train = Some(reinforce(&run, config, start, reference)?);
    }
    if options.until == Until::Train {
        return Ok(RunOutcome::Finished(directory));
    }
    evaluate_all(&run, &trained)?;
    summary::write(&run, &trained)?;
    Ok(RunOutcome::Finished(directory))
}

impl Trained {
    /// The model that the reinforcement stage starts from.
    fn start_of_train(&self) -> &Decoder {
        self.cold_start.as_ref().map_or(&self.base, |finished| &finished.decoder)
    }

    /// Length of the metrics log after the last finished stage.
    fn metrics_bytes(&self) -> u64 {
        let pretrain = self.pretrain.as_ref().map_or(0, |state| state.metrics_bytes);
        let cold_start = self.cold_start.as_ref().map_or(pretrain, |finished| finished.state.metrics_bytes);
        self.train.as_ref().map_or(cold_start, |finished| finished.state.metrics_bytes)
    }

    fn cold_start_flops(&self) -> u64 {
        self.cold_start.as_ref().map_or(0, |finished| finished.state.flops)
    }

    fn train_flops(&self) -> u64 {
        self.train.as_ref().map_or(0, |finished| finished.state.flops)
    }
}

/// Next-token pre-training, or the model that the pipeline names.
fn pretrain(run: &Run) -> Result<(Decoder, Option<StageState<Cursor>>), Error> {
    let initial = || Ok::<_, Error>(initial_decoder(&run.local, &run.vocabulary)?.on(run.device.as_ref()));
    let Some(config) = &run.pipeline.pretrain else { return Ok((initial()?, None)) };
    let stage = SupervisedStage { name: "pretrain", steps: config.steps, optimizer: &config.optimizer };
    let start = || Ok((initial()?, 0, Cursor::default()));
    let positions = max_positions(&run.local)?;
    let examples = |cursor| CorpusExamples::open(run, config, positions, cursor);
    let finished = run_supervised(run, &stage, start, examples)?;
    Ok((finished.decoder, Some(finished.state)))
}

fn cold_start(run: &Run, trained: &Trained) -> Result<Option<Finished<Cursor>>, Error> {
    let Some(config) = &run.pipeline.cold_start else { return Ok(None) };
    let lesson = TraceLesson {
        name: "cold_start",
        steps: config.steps,
        traces: run.sources.traces.as_deref(),
        student: &trained.base,
    };
    Ok(Some(learn_traces(run, config, &lesson, trained.metrics_bytes())?))
}

/// A supervised stage on traces.
struct TraceLesson<'a> {
    name: &'static str,
    steps: u64,
    /// Parquet files with text, thoughts and predictions.
    traces: Option<&'a str>,
    /// The model that the stage starts from.
    student: &'a Decoder,
}

fn learn_traces(
    run: &Run,
    config: &ColdStartConfig,
    lesson: &TraceLesson,
    metrics_bytes: u64,
) -> Result<Finished<Cursor>, Error> {
    let traces = lesson.traces.ok_or_else(|| PipelineError::Missing {
        message: "the cold start has no traces".into(),
        hint: "set cold_start.source to parquet files with text, offset, thought and prediction".into(),
    })?;
    let stage = SupervisedStage { name: lesson.name, steps: lesson.steps, optimizer: &config.optimizer };
    let start = || Ok((lesson.student.clone(), metrics_bytes, Cursor::default()));
    let positions = lesson.student.config().max_positions;
    run_supervised(run, &stage, start, |_| TraceExamples::open(run, config, traces, positions))
}
