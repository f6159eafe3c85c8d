//! `rpt prepare`: a pipeline as far as the tasks, by one worker or a share of many.

use super::failure::Usage;
use super::{output, run};
use rpt::pipeline::{self, Share, ShareOutcome, Until};
use serde_json::json;
use std::path::Path;
use std::str::FromStr;

#[derive(clap::Args)]
pub(super) struct ShareArguments {
    #[command(flatten)]
    run: run::Arguments,
    /// Build one worker's share of the units only: worker I of N, counted from 0 [default: what a Slurm array
    /// (`SLURM_ARRAY_TASK_ID`) or an indexed job of Kubernetes (`JOB_COMPLETION_INDEX` and `JOB_COMPLETIONS`) says, or
    /// everything]
    #[arg(long, value_name = "I/N", value_parser = parse_share)]
    shard: Option<Share>,
}

impl ShareArguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let named =
            self.shard.map_or_else(|| share_of(|name| std::env::var(name).ok()), |share| Ok(Some(share)));
        match named? {
            Some(share) if !self.run.dry_run => self.prepare(share),
            _ => self.run.execute(Until::Tasks),
        }
    }

    fn prepare(&self, share: Share) -> anyhow::Result<()> {
        let loaded = self.run.pipeline.load()?;
        let directory = self.run.out.clone().unwrap_or_else(|| Path::new("runs").join(&loaded.name));
        let outcome = pipeline::prepare_share(&loaded, directory, share, &run::interrupt_flag()?)?;
        let (directory, complete) = match &outcome {
            ShareOutcome::Partial(directory) => (directory, false),
            ShareOutcome::Complete(directory) => (directory, true),
        };
        if self.run.json {
            output::json(&json!({ "run": directory, "complete": complete }))
        } else {
            output::line(&directory.display().to_string())
        }
    }
}

/// `3/64`: worker 3 of 64.
fn parse_share(text: &str) -> Result<Share, String> {
    let numbers = text.split_once('/').and_then(|(index, count)| Some((number(index)?, number(count)?)));
    match numbers {
        Some((index, count)) if index < count => Ok(Share { index, count }),
        _ => Err("a share is I/N with I from 0 to N - 1, for example 3/64".into()),
    }
}

fn number(text: &str) -> Option<usize> {
    usize::from_str(text).ok()
}

/// The share that a scheduler's variables name, if they do.
fn share_of(variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Option<Share>> {
    let read = |name: &str| variable(name).and_then(|text| number(&text));
    if variable("SLURM_ARRAY_TASK_ID").is_some() {
        let step = read("SLURM_ARRAY_TASK_STEP").filter(|&step| step > 0).unwrap_or(1);
        let first = read("SLURM_ARRAY_TASK_MIN").unwrap_or(0);
        let task = read("SLURM_ARRAY_TASK_ID").and_then(|task| task.checked_sub(first));
        return share("SLURM_ARRAY_TASK_ID", task.map(|task| task / step), read("SLURM_ARRAY_TASK_COUNT"));
    }
    if variable("JOB_COMPLETION_INDEX").is_some() {
        return share("JOB_COMPLETION_INDEX", read("JOB_COMPLETION_INDEX"), read("JOB_COMPLETIONS"));
    }
    Ok(None)
}

fn share(name: &str, index: Option<usize>, count: Option<usize>) -> anyhow::Result<Option<Share>> {
    match (index, count) {
        (Some(index), Some(count)) if index < count => Ok(Some(Share { index, count })),
        _ => {
            let message = format!("{name} is set, but not which of how many workers this is");
            Err(Usage::new(message, "say it with --shard I/N; --shard 0/1 is everything").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> anyhow::Result<Option<Share>> {
        share_of(|wanted| {
            let found = variables.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn schedulers_say_which_worker_this_is() {
        assert_eq!(from(&[]).unwrap(), None);
        let array = [
            ("SLURM_ARRAY_TASK_ID", "7"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_STEP", "2"),
            ("SLURM_ARRAY_TASK_COUNT", "4"),
        ];
        assert_eq!(from(&array).unwrap(), Some(Share { index: 3, count: 4 }));
        let job = [("JOB_COMPLETION_INDEX", "0"), ("JOB_COMPLETIONS", "2")];
        assert_eq!(from(&job).unwrap(), Some(Share { index: 0, count: 2 }));
        assert!(from(&job[..1]).is_err());
        assert!(from(&array[..1]).is_err());
    }

    #[test]
    fn shares_are_counted_from_0() {
        assert_eq!(parse_share("3/64"), Ok(Share { index: 3, count: 64 }));
        for wrong in ["64/64", "-1/2", "1", "1/0", "a/b", ""] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
    }
}
