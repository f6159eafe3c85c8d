//! `rpt plan`: what a run would do and hold, without doing it.

use super::output;
use rpt::config::Loaded;
use rpt::pipeline;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Pipeline file (TOML; `rpt schema` describes it)
    #[arg(value_name = "PIPELINE")]
    pipeline: PathBuf,
    /// Replace or add a value of the pipeline file, for example model.device=cuda; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        print(&rpt::config::load(&self.pipeline, &self.set).map_err(rpt::Error::from)?, self.json)
    }
}

/// Prints the plan of a run.
pub(super) fn print(loaded: &Loaded, json: bool) -> anyhow::Result<()> {
    let plan = pipeline::plan(loaded)?;
    if json { output::json(&plan) } else { output::line(plan.to_string().trim_end()) }
}
