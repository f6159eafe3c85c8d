//! `rpt schema`: the JSON schema of the pipeline file.

use super::output;

pub(super) fn execute() -> anyhow::Result<()> {
    let schema = schemars::schema_for!(rpt::config::Pipeline);
    output::line(&serde_json::to_string_pretty(&schema)?)
}
