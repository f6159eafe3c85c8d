//! What can go wrong with checkpoints.

use serde::{Serialize, Serializer};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The newest intact checkpoint belongs to another pipeline.
    #[error("{path}: this checkpoint belongs to another pipeline (it is of `{found}`, this is `{wanted}`)")]
    Foreign {
        /// The checkpoint.
        path: PathBuf,
        /// Identity in its manifest.
        found: String,
        /// Identity of the pipeline that asks.
        wanted: String,
    },
    /// There are checkpoints, and none is intact.
    #[error("{root}: no checkpoint is intact:{}", list(skipped))]
    NoneIntact {
        /// Directory of the checkpoints.
        root: PathBuf,
        /// Each with what is wrong, newest first.
        skipped: Vec<Skipped>,
    },
    /// A checkpoint or a file of it cannot be used.
    #[error("{path}: {damage}")]
    Damaged {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        damage: Damage,
    },
    /// A section's name is not plain, or used twice.
    #[error("checkpoint section `{name}`: {reason}")]
    Section {
        /// The section.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A tensor cannot be written or read as asked.
    #[error("tensor `{name}`: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A JSON section could not be encoded or does not have the expected form.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// Another process writes this directory.
    #[error("{path}: {holder} is using this directory")]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// `process N`, or `another process` if the file does not say which.
        holder: String,
    },
}

impl CheckpointError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { path, source } => io_hint(path, source.kind()),
            Self::Foreign { .. } => {
                Some("use another run name or directory, or restore the pipeline file of this run".into())
            }
            Self::NoneIntact { root, .. } => Some(format!(
                "restore a checkpoint from a copy, or remove {} to start from the beginning",
                root.display()
            )),
            Self::Damaged { damage: Damage::Schema { .. }, .. } => {
                Some("read it with the version of rpt that wrote it, or a newer one".into())
            }
            Self::Damaged { .. } => Some("`rpt verify` lists which checkpoints of the run are intact".into()),
            Self::Json { .. } => Some("the checkpoint was probably written by another version of rpt".into()),
            Self::Locked { .. } => Some("wait for it to end, stop it, or use another run name".into()),
            Self::Section { .. } | Self::Tensor { .. } => None,
        }
    }
}

fn io_hint(path: &Path, kind: io::ErrorKind) -> Option<String> {
    let place = path.parent().unwrap_or(path).display();
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(format!(
            "the disk or quota behind {place} is full. What was committed before is intact. Free some space \
             (rollout logs and the oldest step-* directories can be removed; keep the newest), or lower \
             run.keep_checkpoints, and run the same command again"
        )),
        io::ErrorKind::PermissionDenied => Some(format!("this user may not write to {place}")),
        io::ErrorKind::ReadOnlyFilesystem => Some(format!("the file system behind {place} is read-only")),
        _ => None,
    }
}

fn list(skipped: &[Skipped]) -> String {
    skipped.iter().fold(String::new(), |mut text, one| {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {one}");
        text
    })
}

/// Attaches a path to a system error.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}

/// A checkpoint that was passed over.
#[derive(Debug, Serialize)]
pub struct Skipped {
    /// Its step.
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: Damage,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// Why a checkpoint does not count.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// The commit that wrote it did not finish.
    #[error("there is no manifest.json")]
    NoManifest,
    /// The manifest cannot be trusted.
    #[error("manifest.json: {0}")]
    Manifest(String),
    /// The manifest has a form that this version does not know.
    #[error("manifest.json has schema version {found}, this version of rpt reads {known}")]
    Schema {
        /// Version in the file.
        found: u64,
        /// Version of this program.
        known: u64,
    },
    /// The directory was renamed.
    #[error("manifest.json is of step {found}")]
    Step {
        /// Step in the manifest.
        found: u64,
    },
    /// A file that the manifest lists is not there.
    #[error("{0} is missing")]
    Missing(String),
    /// A file that the manifest lists is not a regular file.
    #[error("{0} is not a regular file")]
    NotAFile(String),
    /// A file has another size than the manifest says.
    #[error("{name} has {found} bytes instead of {expected}")]
    Size {
        /// The file.
        name: String,
        /// Bytes in the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A file has another content than the manifest says.
    #[error("{0} does not match its checksum")]
    Checksum(String),
    /// A file could not be read.
    #[error("{name}: {reason}")]
    Unreadable {
        /// The file.
        name: String,
        /// What the system said.
        reason: String,
    },
    /// A file has the right checksum and a wrong form.
    #[error("{name}: {reason}")]
    Form {
        /// The file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A section that the reader needs was never written.
    #[error("there is no section `{0}`")]
    NoSection(String),
}

impl Serialize for Damage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
