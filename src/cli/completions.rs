//! `rpt completions`: a completion script.

use super::{Cli, output};
use clap::CommandFactory;
use clap_complete::Shell;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Shell that reads the script
    shell: Shell,
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "rpt", &mut script);
        output::data(&script)
    }
}
