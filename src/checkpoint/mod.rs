//! Checkpoints: everything a caller wants to find again, committed as one unit.
//!
//! A checkpoint is a directory `step-NNNNNN/` with the files that the caller gave and a
//! `manifest.json` written last. This room does not know what is being trained.
//!
//! # Commit
//!
//! 1. `.step-N.tmp-PID/` is created; every file is written and fsynced, then the manifest, then the
//!    directory.
//! 2. If `step-N/` exists, it is renamed to `.step-N.old-PID/`.
//! 3. `.step-N.tmp-PID/` is renamed to `step-N/` and the root is fsynced. The commit is done.
//! 4. `.step-N.old-PID/` is deleted. Checkpoints that retention gives up are renamed to
//!    `.step-M.gone-PID/`, the root is fsynced, then they are deleted.
//!
//! # Recovery
//!
//! [`CheckpointStore::open`] puts any crash in between right, whether the process or the machine
//! died:
//!
//! - An `old` directory whose `step-N/` is missing (crash between 2 and 3) is renamed back: the state
//!   before the commit.
//! - Every other `tmp`, `old` or `gone` directory is deleted; none of them is ever the only good copy.
//!
//! What it did is listed in [`CheckpointStore::recovered`]. Directories that do not match these names
//! are never touched. One process at a time may write a root: hold a [`RunLock`].
//!
//! # Bounds
//!
//! Memory: one buffer of [`BUFFER_BYTES`] and the headers. Tensors are streamed both ways.

mod error;
mod lock;
mod manifest;
mod names;
mod reader;
mod storage;
mod store;
mod verify;
mod writer;

pub use error::{CheckpointError, Damage, Skipped};
pub use lock::RunLock;
pub use reader::{Checkpoint, TensorFile};
pub(crate) use storage::temporary_name;
pub use storage::{Disk, Storage, StorageFile, atomic_write, atomic_write_on};
pub use store::{CheckpointStore, Committed, DEFAULT_SHARD_BYTES, Found, Recovered, Recovery};
pub use verify::{CheckpointReport, StoreReport, verify};
pub use writer::{CheckpointWriter, TensorView};

/// Bytes of the buffers that files are written and verified through.
pub const BUFFER_BYTES: usize = 1 << 16;
