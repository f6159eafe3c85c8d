//! Units of a task directory: built apart, committed once, put together at the end.

use super::manifest::{self, Manifest, PARTIAL, SCHEMA_VERSION, unit_name};
use super::{Fingerprints, ShardWriter, TaskCounts, TasksError};
use crate::corpus::{CorpusCounts, SourceRange};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The units of one task directory, each a task directory itself.
///
/// A unit is built under a name of its own and renamed when it is whole, which succeeds for the first
/// worker alone. Workers that build the same unit write the same bytes, so any of them may be first.
#[derive(Clone, Debug)]
pub struct TaskUnits {
    directory: PathBuf,
    fingerprints: Fingerprints,
    shard_bytes: u64,
    count: usize,
}

/// A unit in the making.
pub struct OpenUnit {
    number: usize,
    partial: PathBuf,
    /// Takes the unit's documents.
    pub writer: ShardWriter,
}

impl TaskUnits {
    /// The units of a directory, which is created if need be.
    ///
    /// # Errors
    /// Fails when it cannot be created.
    pub fn open(
        directory: &Path,
        fingerprints: Fingerprints,
        shard_bytes: u64,
        count: usize,
    ) -> Result<Self, TasksError> {
        fs::create_dir_all(directory).map_err(TasksError::io(directory))?;
        Ok(Self { directory: directory.to_owned(), fingerprints, shard_bytes, count })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.directory.join(unit_name(number))
    }

    /// Whether a unit is committed.
    pub fn is_committed(&self, number: usize) -> bool {
        self.path(number).is_dir()
    }

    /// Starts a unit.
    ///
    /// # Errors
    /// Fails when its directory cannot be made.
    pub fn start(&self, number: usize) -> Result<OpenUnit, TasksError> {
        // Two workers may build one unit at a time, on two machines.
        let tag = RandomState::new().hash_one(std::process::id());
        let partial = self.directory.join(format!(".{}-{tag:016x}{PARTIAL}", unit_name(number)));
        fs::create_dir(&partial).map_err(TasksError::io(&partial))?;
        let writer = ShardWriter::new(&partial, self.fingerprints.clone(), self.shard_bytes);
        Ok(OpenUnit { number, partial, writer })
    }

    /// Gives a unit its name, unless another worker was first: its result is the same then.
    ///
    /// # Errors
    /// Fails when a file cannot be written.
    pub fn commit(
        &self,
        unit: OpenUnit,
        sources: Vec<SourceRange>,
        corpus: CorpusCounts,
        counts: TaskCounts,
    ) -> Result<(), TasksError> {
        let path = self.path(unit.number);
        unit.writer.finish(sources, corpus, counts)?;
        match fs::rename(&unit.partial, &path) {
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                fs::remove_dir_all(&unit.partial).map_err(TasksError::io(&unit.partial))
            }
            renamed => {
                renamed.map_err(TasksError::io(&path))?;
                manifest::sync_directory(&self.directory)
            }
        }
    }

    /// All units together; nothing while one is missing.
    ///
    /// # Errors
    /// Fails when a unit is damaged or built with another tokenizer or template, or when no unit has a
    /// position.
    pub fn gather(&self) -> Result<Option<Manifest>, TasksError> {
        if !(0..self.count).all(|number| self.is_committed(number)) {
            return Ok(None);
        }
        let mut whole: Option<Manifest> = None;
        for number in 0..self.count {
            let unit = self.load(number)?;
            match &mut whole {
                None => whole = Some(unit),
                Some(whole) => append(whole, unit),
            }
        }
        match whole {
            Some(whole) if whole.counts.positions == 0 => {
                let dropped = whole.counts.dropped.to_string();
                Err(TasksError::NoPositions { counts: Box::new(whole.counts), dropped })
            }
            whole => Ok(whole),
        }
    }

    /// Writes the manifest of all units, which makes the tasks exist, and removes what workers that were
    /// stopped have left.
    ///
    /// # Errors
    /// Fails when it cannot be written.
    pub fn complete(&self, whole: &Manifest) -> Result<(), TasksError> {
        whole.write(&self.directory)?;
        self.remove_partial();
        Ok(())
    }

    /// The manifest of a unit, its shards named as seen from the whole.
    fn load(&self, number: usize) -> Result<Manifest, TasksError> {
        let path = self.path(number);
        let mut unit = Manifest::load(&path)?;
        unit.check_fingerprints(&path, &self.fingerprints)?;
        for shard in &mut unit.shards {
            shard.file = format!("{}/{}", unit_name(number), shard.file);
        }
        unit.schema_version = SCHEMA_VERSION;
        unit.sources.clear();
        Ok(unit)
    }

    /// A worker that still writes one of these finds that another was first.
    fn remove_partial(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // What cannot be removed harms nobody.
            if name.starts_with(".unit-") && name.ends_with(PARTIAL) {
                let _ = fs::remove_dir_all(entry.path());
            } else if name.starts_with(".tasks.json-") && name.ends_with(PARTIAL) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn append(whole: &mut Manifest, unit: Manifest) {
    whole.shards.extend(unit.shards);
    whole.corpus.add(unit.corpus);
    whole.counts += &unit.counts;
}
