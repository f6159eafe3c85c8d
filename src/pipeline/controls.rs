//! The evaluation table and the controls in it: what the compute of thinking buys when it is spent
//! on supervised training instead.

use super::evaluate::Evaluator;
use super::run::Run;
use super::stage::StageState;
use super::supervised::{CorpusExamples, SupervisedStage, run_supervised, steps_for};
use super::{TraceLesson, Trained, learn_traces};
use crate::config::PretrainConfig;
use crate::corpus::Cursor;
use crate::error::Error;

/// Evaluates every model of the table, training the controls on the way.
///
/// # Errors
/// When a control or an evaluation fails, or a signal asks for a stop.
pub(super) fn evaluate_all(run: &Run, trained: &Trained) -> Result<(), Error> {
    let evaluator = Evaluator::open(run)?;
    evaluator.plain("plain_ntp", &trained.base)?;
    if trained.cold_start.is_some() || trained.train.is_some() {
        evaluator.reasoned("reasoning_before", trained.start_of_train())?;
    }
    if let Some(train) = &trained.train {
        evaluator.reasoned("reasoning_after", &train.decoder)?;
    }
    let mut metrics_bytes = trained.metrics_bytes();
    if let (true, Some(config), Some(state)) =
        (run.pipeline.controls.continued_ntp, &run.pipeline.pretrain, &trained.pretrain)
    {
        metrics_bytes = continue_pretraining(run, trained, config, state, &evaluator)?;
    }
    for control in trace_controls(run, trained) {
        let Some(config) = &run.pipeline.cold_start else { break };
        let finished = learn_traces(run, config, &control, metrics_bytes)?;
        evaluator.reasoned(control.name, &finished.decoder)?;
        metrics_bytes = finished.state.metrics_bytes;
    }
    Ok(())
}

/// Next-token prediction for as much compute as cold start and reinforcement took; returns the
/// length of the metrics log.
fn continue_pretraining(
    run: &Run,
    trained: &Trained,
    config: &PretrainConfig,
    state: &StageState<Cursor>,
    evaluator: &Evaluator,
) -> Result<u64, Error> {
    let steps = steps_for(trained.cold_start_flops() + trained.train_flops(), state);
    let positions = trained.base.config().max_positions;
    let stage = SupervisedStage { name: "continued_ntp", steps, optimizer: &config.optimizer };
    let start = || Ok((trained.base.clone(), trained.metrics_bytes(), state.source));
    let examples = |cursor| CorpusExamples::open(run, config, positions, cursor);
    let finished = run_supervised(run, &stage, start, examples)?;
    evaluator.plain("continued_ntp", &finished.decoder)?;
    Ok(finished.state.metrics_bytes)
}

/// The controls that learn from traces, each for the compute of what it stands in for.
fn trace_controls<'a>(run: &'a Run, trained: &'a Trained) -> Vec<TraceLesson<'a>> {
    let Some(cold_start) = &trained.cold_start else { return Vec::new() };
    let controls = &run.pipeline.controls;
    let more = TraceLesson {
        name: "more_cold_start",
        steps: steps_for(trained.train_flops(), &cold_start.state),
        traces: run.sources.traces.as_deref(),
        student: &cold_start.decoder,
    };
    let clean = TraceLesson {
        name: "clean_traces",
        steps: steps_for(trained.cold_start_flops() + trained.train_flops(), &cold_start.state),
        traces: run.sources.clean_traces.as_deref(),
        student: &trained.base,
    };
    let wanted =
        [(controls.more_cold_start && trained.train_flops() > 0, more), (controls.clean_traces, clean)];
    wanted.into_iter().filter_map(|(is_wanted, control)| is_wanted.then_some(control)).collect()
}
