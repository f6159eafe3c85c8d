//! `rpt report`: the page that shows a run.

use super::output;
use rpt::pipeline::RunDirectory;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Run directory
    run: PathBuf,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let path = RunDirectory::open(&self.run)?.write_report()?;
        output::line(&path.display().to_string())
    }
}
