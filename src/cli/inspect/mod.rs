//! `rpt inspect`: what a file or directory holds. One file for each kind of thing.

mod corpus;
mod generated;
mod model;
mod rollouts;
mod run;
mod tasks;

use super::failure::Usage;
use super::input::say;
use super::output;
use anyhow::Context;
use serde_json::Value;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Corpus: a parquet or JSON-lines file, directory, glob or address in a store; generated corpus; task (also one shard), model, run, rollout or checkpoint directory;
    /// `hf://owner/name` or `hf://datasets/owner/name`
    path: PathBuf,
    /// Column or key that holds the text of a corpus
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Read at most so many documents of a corpus
    #[arg(long, value_name = "N")]
    max_documents: Option<u64>,
    /// Documents or tasks to show
    #[arg(long, value_name = "N", default_value_t = 3)]
    samples: usize,
    /// tokenizer.json that spells tasks out [default: the one that they were built with, near them or named by their run]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a path holds.
enum Kind {
    Tasks,
    TaskShard,
    Checkpoint,
    Run,
    Generated,
    Model,
    Rollouts,
    Corpus,
}

impl Kind {
    /// Decided by the one file that only this kind of directory has.
    fn of(path: &Path) -> Self {
        let telling = [
            ("tasks.json", Self::Tasks),
            ("manifest.json", Self::Checkpoint),
            ("pipeline.toml", Self::Run),
            ("corpus.toml", Self::Generated),
            ("config.json", Self::Model),
        ];
        let found = telling.into_iter().find(|(file, _)| path.join(file).is_file());
        match found {
            Some((_, kind)) => kind,
            None if tasks::is_shard(path) => Self::TaskShard,
            None if is_rollout_log(path) => Self::Rollouts,
            None => Self::Corpus,
        }
    }
}

fn is_rollout_log(directory: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else { return false };
    let names = entries.flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().starts_with("rollouts-"))
}

impl Arguments {
    pub(super) fn execute(&self) -> anyhow::Result<()> {
        let path = rpt::hub::resolve(&self.path, &say).map_err(rpt::Error::from)?;
        let kind = Kind::of(&path);
        let value = match kind {
            Kind::Tasks => tasks::inspect(&path, self.samples, self.tokenizer.as_deref())?,
            Kind::TaskShard => tasks::inspect_shard(&path, self.samples, self.tokenizer.as_deref())?,
            Kind::Checkpoint => run::inspect_checkpoint(&path)?,
            Kind::Run => run::inspect(&path)?,
            Kind::Generated => generated::inspect(&path, self.samples)?,
            Kind::Model => model::inspect(&path)?,
            Kind::Rollouts => rollouts::inspect(&path, self.samples)?,
            Kind::Corpus => self.corpus(&path)?,
        };
        match kind {
            Kind::Tasks | Kind::TaskShard if !self.json => output::data(tasks::for_people(&value).as_bytes()),
            Kind::Corpus if !self.json => output::data(corpus::for_people(&value).as_bytes()),
            _ => output::value(&value, self.json),
        }
    }

    fn corpus(&self, path: &Path) -> anyhow::Result<Value> {
        let source = path.to_str().ok_or_else(|| {
            Usage::new(format!("{} is not UTF-8", path.display()), "rename it, or name its directory")
        })?;
        Ok(corpus::inspect(source, &self.text_column, self.max_documents, self.samples)?)
    }
}

/// Reads a small text file.
fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
