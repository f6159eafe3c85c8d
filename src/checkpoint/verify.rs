//! A full report on a directory of checkpoints, for `rpt verify`.

use super::CheckpointError;
use super::manifest::verify_checkpoint;
use super::names::{parse_hidden, parse_step, step_name};
use super::store::list_names;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What a directory of checkpoints holds.
#[derive(Debug, Serialize)]
pub struct StoreReport {
    /// The directory.
    pub root: PathBuf,
    /// Its checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointReport>,
    /// Directories that an interrupted commit left behind; the next run clears them.
    pub leftovers: Vec<String>,
}

impl StoreReport {
    /// Whether every checkpoint is intact.
    pub fn intact(&self) -> bool {
        self.checkpoints.iter().all(|checkpoint| checkpoint.intact)
    }

    /// Step of the newest intact checkpoint.
    pub fn newest_intact(&self) -> Option<u64> {
        self.checkpoints.iter().rev().find(|checkpoint| checkpoint.intact).map(|checkpoint| checkpoint.step)
    }
}

/// One checkpoint, read to the last byte.
#[derive(Debug, Serialize)]
pub struct CheckpointReport {
    /// Its step.
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
    /// Whether every file is as it was written.
    pub intact: bool,
    /// What is wrong, if it is not.
    pub damage: Option<String>,
    /// The pipeline that it belongs to, if it is intact.
    pub identity: Option<String>,
    /// Bytes of its files, if it is intact.
    pub bytes: Option<u64>,
}

/// Reads every checkpoint below a directory to the last byte; changes nothing.
///
/// # Errors
/// A directory that cannot be listed. Damaged checkpoints are in the report.
pub fn verify(root: &Path) -> Result<StoreReport, CheckpointError> {
    let names = list_names(root)?;
    let mut steps: Vec<u64> = names.iter().filter_map(|name| parse_step(name)).collect();
    steps.sort_unstable();
    let leftovers = names.into_iter().filter(|name| parse_hidden(name).is_some()).collect();
    let checkpoints = steps.into_iter().map(|step| report(root, step)).collect();
    Ok(StoreReport { root: root.to_owned(), checkpoints, leftovers })
}

fn report(root: &Path, step: u64) -> CheckpointReport {
    let verdict = verify_checkpoint(root, step);
    let manifest = verdict.as_ref().ok();
    CheckpointReport {
        step,
        path: root.join(step_name(step)),
        intact: manifest.is_some(),
        identity: manifest.map(|manifest| manifest.identity.clone()),
        bytes: manifest.map(super::manifest::Manifest::bytes),
        damage: verdict.err().map(|damage| damage.to_string()),
    }
}
