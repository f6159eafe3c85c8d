//! `tasks.json`: what a directory of task shards holds, written last.

use super::{TaskCounts, TasksError};
use crate::corpus::{CorpusCounts, SourceRange};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Version of the shards' schema and of the manifest.
pub const SCHEMA_VERSION: u32 = 4;

const FILE_NAME: &str = "tasks.json";
/// What the names of files and directories end with that are not whole.
pub(super) const PARTIAL: &str = ".partial";

/// What tasks were built with: shards of another tokenizer or template are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Of the tokenizer.
    pub tokenizer: String,
    /// Of the prompt template.
    pub template: String,
}

/// One task shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Name of the file.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of the file, in hexadecimal.
    pub checksum: String,
    /// Task documents in it.
    pub documents: u64,
    /// Positions of those documents.
    pub positions: u64,
}

/// The manifest of a directory of task shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// What the tasks were built with.
    pub fingerprints: Fingerprints,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
    /// Parts of the corpus that the tasks of a unit were cut from; empty in the manifest of all units.
    pub sources: Vec<SourceRange>,
    /// What was read, and what was not.
    pub corpus: CorpusCounts,
    /// What became of it.
    pub counts: TaskCounts,
}

impl Manifest {
    /// Reads the manifest of a directory.
    ///
    /// # Errors
    /// Fails when there is none, or it is damaged or of another version.
    pub fn load(directory: &Path) -> Result<Self, TasksError> {
        let path = directory.join(FILE_NAME);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(TasksError::Unfinished { path: directory.to_owned() });
            }
            read => read.map_err(TasksError::io(&path))?,
        };
        let damaged = |what: String| TasksError::damaged(&path, what);
        let value: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let version = value["schema_version"].as_u64().ok_or_else(|| damaged("no schema version".into()))?;
        if version != u64::from(SCHEMA_VERSION) {
            return Err(TasksError::Version { path, found: u32::try_from(version).unwrap_or(u32::MAX) });
        }
        let manifest: Self = serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Refuses tasks that were built with another tokenizer or template.
    pub(super) fn check_fingerprints(
        &self,
        directory: &Path,
        expected: &Fingerprints,
    ) -> Result<(), TasksError> {
        let found = &self.fingerprints;
        let pairs = [
            ("tokenizer", &found.tokenizer, &expected.tokenizer),
            ("prompt template", &found.template, &expected.template),
        ];
        for (what, found, expected) in pairs {
            if found != expected {
                let (found, expected) = (abbreviated(found), abbreviated(expected));
                return Err(TasksError::Mismatch { path: directory.to_owned(), what, found, expected });
            }
        }
        Ok(())
    }

    /// Number of task documents.
    pub fn documents(&self) -> u64 {
        self.shards.iter().map(|shard| shard.documents).fold(0, u64::saturating_add)
    }

    /// Number of positions: the tasks of one epoch.
    pub fn positions(&self) -> u64 {
        self.shards.iter().map(|shard| shard.positions).fold(0, u64::saturating_add)
    }

    /// Refuses a manifest that no writer would have written.
    fn check(&self) -> Result<(), String> {
        if self.positions() != self.counts.positions {
            return Err(format!("shards hold {} positions of {}", self.positions(), self.counts.positions));
        }
        let numbers: Option<Vec<_>> = self.shards.iter().map(|shard| numbers_of(&shard.file)).collect();
        if !numbers.is_some_and(|numbers| numbers.is_sorted_by(|a, b| a < b)) {
            return Err("its shards have other names than a writer gives".into());
        }
        for shard in &self.shards {
            if shard.documents == 0 || shard.positions < shard.documents {
                return Err(format!("`{}` has documents without positions", shard.file));
            }
        }
        Ok(())
    }

    /// Writes the manifest, which makes the shards exist.
    pub(super) fn write(&self, directory: &Path) -> Result<(), TasksError> {
        let path = directory.join(FILE_NAME);
        let json = serde_json::to_string_pretty(self).map_err(|error| TasksError::io(&path)(error.into()))?;
        let partial = partial_path(&path);
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(json.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()
        });
        written.map_err(TasksError::io(&partial))?;
        match std::fs::rename(&partial, &path) {
            // Another worker has completed the same tasks, and cleared away what this one was writing.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.exists() => Ok(()),
            renamed => {
                renamed.map_err(TasksError::io(&path))?;
                sync_directory(directory)
            }
        }
    }
}

/// The first digits of a fingerprint, enough to tell two apart.
fn abbreviated(fingerprint: &str) -> String {
    fingerprint.chars().take(12).collect()
}

/// Name of the shard with a number.
pub(super) fn shard_name(number: usize) -> String {
    format!("tasks-{number:05}.arrow")
}

/// Name of the directory of a unit.
pub(super) fn unit_name(number: usize) -> String {
    format!("unit-{number:05}")
}

/// Numbers of unit and shard in a shard's name; a task directory of its own has no units.
fn numbers_of(file: &str) -> Option<(Option<u64>, u64)> {
    let (unit, shard) = match file.split_once('/') {
        Some((unit, shard)) => (Some(digits(unit.strip_prefix("unit-")?)?), shard),
        None => (None, file),
    };
    Some((unit, digits(shard.strip_prefix("tasks-")?.strip_suffix(".arrow")?)?))
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Where a file stands until it is complete. Two workers may write the same manifest at a time.
fn partial_path(path: &Path) -> PathBuf {
    let tag = RandomState::new().hash_one(std::process::id());
    path.with_file_name(format!(".{FILE_NAME}-{tag:016x}{PARTIAL}"))
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), TasksError> {
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(TasksError::io(directory))
}
