//! `rpt run` and `rpt train`: a pipeline up to some stage.

use super::input::PipelineArguments;
use super::{output, plan};
use anyhow::Context;
use rpt::pipeline::{self, RunOptions, RunOutcome, Until};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Exit code of a second signal: the last checkpoint is where the same command goes on.
const INTERRUPTED: i32 = 75;

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) pipeline: PipelineArguments,
    /// Run directory [default: named after the pipeline file]
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Resolve and check everything, print the plan with its derived sizes, and touch nothing (of a model on
    /// the Hub the configuration is fetched)
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Arguments {
    pub(super) fn execute(&self, until: Until) -> anyhow::Result<()> {
        let loaded = self.pipeline.load()?;
        if self.dry_run {
            return plan::print(&loaded, self.json);
        }
        let options = RunOptions { out: self.out.clone(), until };
        let outcome = pipeline::run(&loaded, &options, &interrupt_flag()?)?;
        self.print(&outcome)
    }

    fn print(&self, outcome: &RunOutcome) -> anyhow::Result<()> {
        let (run, already) = match outcome {
            RunOutcome::Finished(run) => (run, false),
            RunOutcome::AlreadyFinished(run) => (run, true),
        };
        if already {
            output::note("already finished: nothing to do");
        }
        if self.json {
            output::json(&json!({ "run": run, "already_finished": already }))
        } else {
            output::line(&run.display().to_string())
        }
    }
}

/// A flag that the first Ctrl-C or SIGTERM sets; the second ends the process.
pub(super) fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupt = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Actions run in the order of their registration: the first signal finds the flag unset.
        flag::register_conditional_shutdown(signal, INTERRUPTED, interrupt.clone())
            .and_then(|_| flag::register(signal, interrupt.clone()))
            .context("cannot listen for signals")?;
    }
    Ok(interrupt)
}
