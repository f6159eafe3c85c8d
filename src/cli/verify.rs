//! `rpt verify`: whether a run directory is what was written.

use super::failure::Damaged;
use super::output;
use rpt::pipeline::RunDirectory;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Run directory
    run: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let report = RunDirectory::open(&self.run)?.verify()?;
        output::value(&serde_json::to_value(&report)?, self.json)?;
        if report.intact() { Ok(()) } else { Err(Damaged(self.run.display().to_string()).into()) }
    }
}
