//! `rpt eval`: next-token accuracy, plain and reasoned.

use super::input::say;
use super::output;
use rpt::pipeline::RunDirectory;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Run directory
    run: PathBuf,
    /// Evaluate this Hugging Face directory, or `hf://owner/name`, instead of a model of the run
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Stage whose newest checkpoint is evaluated [default: the last one]
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    stage: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let run = RunDirectory::open(&self.run)?;
        let model = self.model.as_deref().map(|model| rpt::hub::resolve_model(model, &say));
        let model = model.transpose().map_err(rpt::Error::from)?;
        let evaluation = run.evaluate(model.as_deref(), self.stage.as_deref())?;
        output::value(&evaluation, self.json)
    }
}
