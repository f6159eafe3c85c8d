//! `rpt plan`: what a run would do and hold, without doing it.

use super::input::PipelineArguments;
use super::output;
use rpt::config::Loaded;
use rpt::pipeline;

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        print(&self.pipeline.load()?, self.json)
    }
}

/// Prints the plan of a run.
pub(super) fn print(loaded: &Loaded, json: bool) -> anyhow::Result<()> {
    let plan = pipeline::plan(loaded)?;
    if json { output::json(&plan) } else { output::line(plan.to_string().trim_end()) }
}
