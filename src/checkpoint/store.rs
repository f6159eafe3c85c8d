//! A directory of checkpoints: commit, recovery, retention, and which one to resume from.

use super::error::at;
use super::manifest::{Manifest, verify_checkpoint};
use super::names::{Role, hidden_name, parse_hidden, parse_step, step_name};
use super::storage::{ensure_dir, remove_tree};
use super::{Checkpoint, CheckpointError, CheckpointWriter, Disk, Skipped, Storage};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of tensors in one shard, unless the store is told otherwise.
pub const DEFAULT_SHARD_BYTES: usize = 4 << 30;

/// The checkpoints of one run. One process at a time may use it; hold a [`super::RunLock`].
#[derive(Debug)]
pub struct CheckpointStore {
    root: PathBuf,
    keep: usize,
    shard_bytes: usize,
    storage: Arc<dyn Storage>,
    recovered: Vec<Recovered>,
    /// Identity of each checkpoint that was verified or written here; `None` if it is damaged. Saves
    /// retention from reading every checkpoint at every commit.
    verdicts: BTreeMap<u64, Option<String>>,
}

/// What a commit did.
#[derive(Debug)]
pub struct Committed {
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Bytes of its files, the manifest not counted.
    pub bytes: u64,
    /// Whether a checkpoint of the same step was replaced.
    pub replaced: bool,
    /// Steps whose checkpoints retention removed, ascending.
    pub removed: Vec<u64>,
    /// Why something old could not be removed. The new checkpoint is safe all the same; the next
    /// [`CheckpointStore::open`] tries again.
    pub cleanup_errors: Vec<CheckpointError>,
}

/// Where to resume from.
#[derive(Debug)]
pub struct Found {
    /// The newest intact checkpoint; `None` if there is no checkpoint at all.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are damaged, newest first: to be said loudly.
    pub skipped: Vec<Skipped>,
}

/// What was done about a directory that an interrupted commit left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// It was incomplete or superseded, and is removed.
    Removed,
    /// It was the checkpoint of its step, moved aside, and is back in place.
    Restored,
}

/// A directory that an interrupted commit left behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// The directory's name.
    pub name: String,
    /// What was done about it.
    pub recovery: Recovery,
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = match self.recovery {
            Recovery::Removed => "removed",
            Recovery::Restored => "restored",
        };
        write!(f, "{done} {}, left behind by an interrupted commit", self.name)
    }
}

impl CheckpointStore {
    /// Opens a directory, creating it if needed, and clears up after an interrupted commit.
    /// Retention keeps `keep` intact checkpoints besides the newest.
    ///
    /// # Errors
    /// What the system said.
    pub fn open(root: &Path, keep: usize) -> Result<Self, CheckpointError> {
        Self::open_on(Arc::new(Disk), root, keep)
    }

    /// [`CheckpointStore::open`] on a given storage.
    ///
    /// # Errors
    /// What the system said.
    pub fn open_on(storage: Arc<dyn Storage>, root: &Path, keep: usize) -> Result<Self, CheckpointError> {
        ensure_dir(storage.as_ref(), root)?;
        let recovered = recover(storage.as_ref(), root)?;
        Ok(Self { recovered, ..Self::as_it_is(storage, root, keep) })
    }

    /// [`CheckpointStore::newest`] for a reader beside the writer: changes nothing, and leaves alone
    /// what a commit that is under way has in its temporary directory.
    ///
    /// # Errors
    /// As [`CheckpointStore::newest`], or a directory that cannot be listed.
    pub fn peek(root: &Path, identity: &str) -> Result<Found, CheckpointError> {
        Self::as_it_is(Arc::new(Disk), root, usize::MAX).newest(identity)
    }

    /// One checkpoint by its step, for a reader beside the writer; `None` where there is none.
    ///
    /// # Errors
    /// When it is damaged or belongs to another pipeline.
    pub fn peek_step(root: &Path, identity: &str, step: u64) -> Result<Option<Checkpoint>, CheckpointError> {
        let path = root.join(step_name(step));
        if !path.exists() {
            return Ok(None);
        }
        match verify_checkpoint(root, step) {
            Err(reason) => {
                let skipped = vec![Skipped { step, path, reason }];
                Err(CheckpointError::NoneIntact { root: root.to_owned(), skipped })
            }
            Ok(Manifest { identity: found, .. }) if found != identity => {
                Err(CheckpointError::Foreign { path, found, wanted: identity.to_owned() })
            }
            Ok(manifest) => Ok(Some(Checkpoint::new(path, manifest))),
        }
    }

    /// Steps that have a checkpoint, intact or not, in their order.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn steps(root: &Path) -> Result<Vec<u64>, CheckpointError> {
        list_steps(root)
    }

    fn as_it_is(storage: Arc<dyn Storage>, root: &Path, keep: usize) -> Self {
        Self {
            root: root.to_owned(),
            keep,
            shard_bytes: DEFAULT_SHARD_BYTES,
            storage,
            recovered: Vec::new(),
            verdicts: BTreeMap::new(),
        }
    }

    /// Sets how many bytes of tensors one shard may hold.
    #[must_use]
    pub fn with_shard_bytes(mut self, shard_bytes: usize) -> Self {
        self.shard_bytes = shard_bytes;
        self
    }

    /// Directories that an interrupted commit had left behind when the store was opened.
    pub fn recovered(&self) -> &[Recovered] {
        &self.recovered
    }

    /// Writes a checkpoint: `write` gives its files, and they become visible together or not at all.
    /// A checkpoint of the same step is replaced. Afterwards retention removes the oldest.
    ///
    /// # Errors
    /// The first thing that went wrong; the checkpoints are as they were before then.
    pub fn commit<F>(&mut self, step: u64, identity: &str, write: F) -> Result<Committed, CheckpointError>
    where
        F: FnOnce(&mut CheckpointWriter) -> Result<(), CheckpointError>,
    {
        let temporary = self.root.join(hidden_name(step, Role::Temporary));
        let written = self.write(&temporary, step, identity, write).and_then(|manifest| {
            let replaced = self.publish(&temporary, step)?;
            Ok((manifest, replaced))
        });
        let (manifest, replaced) = written.inspect_err(|_| {
            // The first error is the one to report; what stays behind is cleared by the next `open`.
            let _ = self.remove_if_there(&temporary);
        })?;
        self.verdicts.insert(step, Some(identity.to_owned()));
        let mut cleanup_errors = Vec::new();
        let old = self.root.join(hidden_name(step, Role::Old));
        cleanup_errors.extend(self.remove_if_there(&old).err());
        let removed = self.retain(step, identity, &mut cleanup_errors);
        let path = self.root.join(step_name(step));
        Ok(Committed { path, bytes: manifest.bytes(), replaced, removed, cleanup_errors })
    }

    /// The newest checkpoint that is intact to the last byte, and the damaged ones newer than it.
    ///
    /// # Errors
    /// [`CheckpointError::Foreign`] if it belongs to another pipeline, and
    /// [`CheckpointError::NoneIntact`] if there are checkpoints and all are damaged: to start anew
    /// silently would throw the run away.
    pub fn newest(&mut self, identity: &str) -> Result<Found, CheckpointError> {
        let mut skipped = Vec::new();
        for step in list_steps(&self.root)?.into_iter().rev() {
            let path = self.root.join(step_name(step));
            let verdict = verify_checkpoint(&self.root, step);
            self.verdicts.insert(step, verdict.as_ref().ok().map(|manifest| manifest.identity.clone()));
            match verdict {
                Err(reason) => skipped.push(Skipped { step, path, reason }),
                Ok(Manifest { identity: found, .. }) if found != identity => {
                    return Err(CheckpointError::Foreign { path, found, wanted: identity.to_owned() });
                }
                Ok(manifest) => {
                    return Ok(Found { checkpoint: Some(Checkpoint::new(path, manifest)), skipped });
                }
            }
        }
        if skipped.is_empty() {
            return Ok(Found { checkpoint: None, skipped });
        }
        Err(CheckpointError::NoneIntact { root: self.root.clone(), skipped })
    }

    fn write<F>(
        &self,
        temporary: &Path,
        step: u64,
        identity: &str,
        write: F,
    ) -> Result<Manifest, CheckpointError>
    where
        F: FnOnce(&mut CheckpointWriter) -> Result<(), CheckpointError>,
    {
        self.remove_if_there(temporary)?;
        self.storage.create_dir(temporary).map_err(at(temporary))?;
        let mut writer = CheckpointWriter::new(self.storage.as_ref(), temporary.to_owned(), self.shard_bytes);
        write(&mut writer)?;
        writer.finish(step, identity)
    }

    /// Steps 2 and 3 of the commit; whether a checkpoint was replaced.
    fn publish(&self, temporary: &Path, step: u64) -> Result<bool, CheckpointError> {
        let place = self.root.join(step_name(step));
        let old = self.root.join(hidden_name(step, Role::Old));
        let replaces = place.exists();
        if replaces {
            self.remove_if_there(&old)?;
            self.storage.rename(&place, &old).map_err(at(&place))?;
        }
        let published =
            self.storage.rename(temporary, &place).and_then(|()| self.storage.sync_dir(&self.root));
        if let Err(source) = published {
            self.unpublish(temporary, &place, &old);
            return Err(at(&place)(source));
        }
        Ok(replaces)
    }

    /// Puts everything back as it was before [`Self::publish`], as far as the disk lets us; what it
    /// does not let us, the next `open` does.
    fn unpublish(&self, temporary: &Path, place: &Path, old: &Path) {
        if !temporary.exists() {
            let _ = self.storage.rename(place, temporary);
        }
        if old.exists() && !place.exists() {
            let _ = self.storage.rename(old, place);
        }
    }

    fn remove_if_there(&self, directory: &Path) -> Result<(), CheckpointError> {
        if directory.exists() { remove_tree(self.storage.as_ref(), directory) } else { Ok(()) }
    }

    /// Gives up intact checkpoints of this pipeline beyond the newest `keep` + 1, and never the one
    /// just written. Damaged and foreign ones neither count nor go.
    fn retain(&mut self, newest: u64, identity: &str, errors: &mut Vec<CheckpointError>) -> Vec<u64> {
        let steps = match list_steps(&self.root) {
            Ok(steps) => steps,
            Err(error) => {
                errors.push(error);
                return Vec::new();
            }
        };
        self.verdicts.retain(|step, _| steps.binary_search(step).is_ok());
        let mut intact: Vec<u64> =
            steps.into_iter().filter(|step| *step != newest && self.is_intact(*step, identity)).collect();
        intact.truncate(intact.len().saturating_sub(self.keep));
        self.give_up(&intact).unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        })
    }

    fn is_intact(&mut self, step: u64, identity: &str) -> bool {
        let root = &self.root;
        let verdict = self
            .verdicts
            .entry(step)
            .or_insert_with(|| verify_checkpoint(root, step).ok().map(|manifest| manifest.identity));
        let directory = root.join(step_name(step));
        // The verdict may be hours old, so the cheap half of it is renewed.
        verdict.as_deref() == Some(identity)
            && Manifest::read(&directory, step).is_ok_and(|manifest| manifest.check_sizes(&directory).is_ok())
    }

    fn give_up(&mut self, steps: &[u64]) -> Result<Vec<u64>, CheckpointError> {
        if steps.is_empty() {
            return Ok(Vec::new());
        }
        for step in steps {
            let place = self.root.join(step_name(*step));
            let gone = self.root.join(hidden_name(*step, Role::Gone));
            self.remove_if_there(&gone)?;
            self.storage.rename(&place, &gone).map_err(at(&place))?;
            self.verdicts.remove(step);
        }
        // Without this a crash of the machine could bring back the name without the files.
        self.storage.sync_dir(&self.root).map_err(at(&self.root))?;
        for step in steps {
            remove_tree(self.storage.as_ref(), &self.root.join(hidden_name(*step, Role::Gone)))?;
        }
        Ok(steps.to_vec())
    }
}

/// Names of the directories in a directory, sorted; names that are not UTF-8 are not ours.
pub(super) fn list_names(root: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root).map_err(at(root))? {
        let entry = entry.map_err(at(root))?;
        if entry.path().is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Steps that have a directory, ascending.
fn list_steps(root: &Path) -> Result<Vec<u64>, CheckpointError> {
    let mut steps: Vec<u64> = list_names(root)?.iter().filter_map(|name| parse_step(name)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Puts an interrupted commit right: see the room's documentation.
fn recover(storage: &dyn Storage, root: &Path) -> Result<Vec<Recovered>, CheckpointError> {
    let mut recovered = Vec::new();
    for name in list_names(root)? {
        let Some((step, role)) = parse_hidden(&name) else { continue };
        let hidden = root.join(&name);
        let place = root.join(step_name(step));
        let recovery = if role == Role::Old && !place.exists() {
            storage.rename(&hidden, &place).map_err(at(&hidden))?;
            storage.sync_dir(root).map_err(at(root))?;
            Recovery::Restored
        } else {
            remove_tree(storage, &hidden)?;
            Recovery::Removed
        };
        recovered.push(Recovered { name, recovery });
    }
    Ok(recovered)
}
