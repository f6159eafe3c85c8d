//! What the commands use of the pipeline room.
pub(crate) use rpt::pipeline::{RunDirectory, RunOptions, RunOutcome, Until, plan, run};

/// Exit code of a library error.
pub(crate) fn exit_code(error: &rpt::Error) -> u8 {
    error.exit_code()
}
