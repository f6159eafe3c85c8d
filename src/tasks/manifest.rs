//! `tasks.json`: what a directory of task shards holds, written last.

use super::{TaskCounts, TasksError};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Version of the shards' schema and of the manifest.
pub const SCHEMA_VERSION: u32 = 2;

const FILE_NAME: &str = "tasks.json";

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
    /// What became of the corpus.
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
        for (shard, number) in self.shards.iter().zip(0..) {
            if shard.file != shard_name(number) {
                return Err(format!("shard {number} is named `{}`", shard.file));
            }
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
        publish(&partial, &path)
    }
}

/// Name of the shard with a number.
pub(super) fn shard_name(number: usize) -> String {
    format!("tasks-{number:05}.arrow")
}

/// Where a file stands until it is complete.
pub(super) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Gives a complete, synced file its name, durably.
pub(super) fn publish(partial: &Path, path: &Path) -> Result<(), TasksError> {
    std::fs::rename(partial, path).map_err(TasksError::io(path))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(TasksError::io(directory))
}

/// Removes what an earlier build left: its manifest first, so that no half of it looks whole.
pub(super) fn clear(directory: &Path) -> Result<(), TasksError> {
    std::fs::create_dir_all(directory).map_err(TasksError::io(directory))?;
    let manifest = directory.join(FILE_NAME);
    match std::fs::remove_file(&manifest) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(TasksError::io(&manifest)(error));
        }
        _ => {}
    }
    for entry in std::fs::read_dir(directory).map_err(TasksError::io(directory))? {
        let entry = entry.map_err(TasksError::io(directory))?;
        if entry.file_name().to_str().is_some_and(is_shard_or_partial) {
            std::fs::remove_file(entry.path()).map_err(TasksError::io(&entry.path()))?;
        }
    }
    Ok(())
}

fn is_shard_or_partial(name: &str) -> bool {
    let complete = name.strip_suffix(".partial").unwrap_or(name);
    let number = complete.strip_prefix("tasks-").and_then(|rest| rest.strip_suffix(".arrow"));
    number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
        || name == "tasks.json.partial"
}
